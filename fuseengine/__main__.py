"""``python -m fuseengine`` is the command ``fuseengine``."""

from fuseengine.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
