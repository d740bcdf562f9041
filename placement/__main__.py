"""`python -m placement MODEL`: where each layer goes and how many KV tokens are left, before anything loads.

`python -m placement cluster INVENTORY MODELS` does it for a whole cluster. `headroom plan` is the same command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from placement import cluster_command, plan_command
from placement.errors import PlacementError


def main(argv: Sequence[str] | None = None, prog: str = "placement") -> int:
    """Print a plan; the exit code: 0, or 2 with one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    whole = arguments[:1] == ["cluster"]
    command = cluster_command if whole else plan_command
    prog = f"{prog} cluster" if whole else prog
    options = command.arguments(prog).parse_args(arguments[1:] if whole else arguments)
    try:
        print(command.run(options))
    except PlacementError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
