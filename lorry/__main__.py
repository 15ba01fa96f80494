"""Entry point of `lorry` and `python -m lorry`. Nothing is imported before Ctrl-C is handled."""

from __future__ import annotations

_EXIT_INTERRUPTED = 130


def main() -> None:
    try:
        from lorry.cli.main import main as command

        command()
    except KeyboardInterrupt:
        raise SystemExit(_EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
