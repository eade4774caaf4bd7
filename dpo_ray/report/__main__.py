"""`python -m dpo_ray.report RUN [RUN ...]`: the page of a run, or of several side by side."""

import argparse
import sys
from collections.abc import Sequence

from dpo_ray.report.page import write_comparison, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print its path; 2 where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m dpo_ray.report", description=__doc__)
    parser.add_argument("run_dir", nargs="+", help="folder or URL of a run; several are compared")
    parser.add_argument(
        "--out", help="file to write; unset: report.html in the run's folder, or comparison.html here"
    )
    given = parser.parse_args(arguments)
    try:
        if len(given.run_dir) == 1:
            print(write_report(given.run_dir[0], out=given.out))
        else:
            print(write_comparison(given.run_dir, out=given.out or "comparison.html"))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
