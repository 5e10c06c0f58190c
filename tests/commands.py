"""Commands, called in this process."""

from __future__ import annotations

from model.cli import run


def exit_code(main, config, *argv, prog="x", **options) -> int:
    """The exit code of `python -m ... ARGV`; options are those of `model.cli.run`."""
    try:
        run(main, config, prog=prog, argv=[str(arg) for arg in argv], **options)
    except SystemExit as exit_:
        return exit_.code
    return 0
