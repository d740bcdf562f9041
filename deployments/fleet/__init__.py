"""The live fleet page: `/fleet` shows what `/fleet/state` says each second."""
