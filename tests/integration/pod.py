"""A process as in the pods of k8s/: uid 1000, read-only root, no capabilities, its own mounts, processes and network.

What stands for the pod's volumes: /tmp and /dev/shm are new and writable (HOME and /models lie in /tmp); the home
folders of this machine are not there, save what Python and the checkout need. Needs the right to make namespaces, which
root has outside most containers. `python -m tests.integration.pod COMMAND...` runs a command so.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = "/tmp/home"
MODELS = "/tmp/models"
NAMESPACES = ("unshare", "--mount", "--pid", "--net", "--fork", "--kill-child")
_HIDDEN = {"/tmp": "1777", "/root": "755", "/home": "755"}
_SCRIPT = """
set -eu
root=/mnt
mount --rbind / "$root"
mount -t tmpfs -o mode=1777,size=1g pod-shm "$root/dev/shm"
mount -t proc proc "$root/proc"
{mounts}
mount -o remount,bind,ro "$root"
install -d -o 1000 -g 100 "$root{home}" "$root{models}"
ip link set lo up
exec chroot "$root" setpriv --reuid 1000 --regid 100 --clear-groups --inh-caps=-all --bounding-set=-all \
    --no-new-privs env --chdir={home} "$@"
"""


def why_not() -> str | None:
    """Why this machine can't; None if it can."""
    if missing := [tool for tool in ("unshare", "setpriv", "ip", "chroot") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed"
    tried = subprocess.run(
        [*NAMESPACES, "sh", "-c", "mount -t tmpfs tmpfs /mnt && ip link set lo up && setpriv --no-new-privs true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"mount, process and network namespaces: {tried.stderr.strip()}"


def command(inner: Sequence[str]) -> list[str]:
    """The command line that runs `inner` as in a pod."""
    mounts = [f'mount -t tmpfs -o mode={mode} pod "$root{folder}"' for folder, mode in _HIDDEN.items()]
    mounts += [_shown(path) for path in _outermost(map(Path, (ROOT, sys.prefix, sys.base_prefix)))]
    script = _SCRIPT.format(mounts="\n".join(mounts), home=HOME, models=MODELS)
    return [*NAMESPACES, "sh", "-c", script, "pod", *_environment(), *inner]


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """Those under a hidden folder that lie in no other one of them."""
    hidden = [path.resolve() for path in paths if any(path.resolve().is_relative_to(folder) for folder in _HIDDEN)]
    return [path for path in sorted(set(hidden)) if not any(path.is_relative_to(o) for o in hidden if o != path)]


def _shown(path: Path) -> str:
    quoted = shlex.quote(str(path))
    return (
        f'mkdir -p "$root"{quoted} && mount --bind {quoted} "$root"{quoted} && mount -o remount,bind,ro "$root"{quoted}'
    )


def _environment() -> list[str]:
    """Nothing of this machine's, for `env`."""
    variables = {
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "HOME": HOME,
        "HEADROOM_HOME": f"{MODELS}/headroom",
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
    }
    return ["--ignore-environment", *(f"{name}={value}" for name, value in variables.items())]


if __name__ == "__main__":
    line = command(sys.argv[1:])
    os.execvp(line[0], line)
