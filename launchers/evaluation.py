"""What every eval.py does: compare the models of its project, with launch.sh's Python if this one lacks packages."""

from __future__ import annotations

from launchers.start_again import start_again


def evaluate(script: str, **environment: str) -> None:
    """Compare the models of the project whose eval.py is `script`, and exit; `environment` as in `start_again`."""
    try:
        from settings import PROJECT, Config  # the project's: its folder comes first on the path

        from common.config import check_command_line, parse_config

        check_command_line(Config, script)  # before torch is imported, which takes seconds

        from common.comparison import compare
        from common.errors import run
    except ModuleNotFoundError as error:
        start_again(error, **environment)

    def main() -> None:
        compare(parse_config(Config, script), project=PROJECT)

    run(main)
