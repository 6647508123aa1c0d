"""All figures, each in a process of its own, and then the page: `python -m benchmarks`.

python -m benchmarks                     # everything; about half an hour on two quiet cores
python -m benchmarks --only step scaling
python -m benchmarks --device cuda       # on a GPU; figures without a GPU side run on the CPU
python -m benchmarks --quick             # to see that it all works; writes nothing
"""

import argparse
import subprocess
import sys

from benchmarks.peak import HOME
from benchmarks.render import FIGURES, write


def main(arguments: list[str] | None = None) -> int:
    """How many figures failed; the page is written from what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="by default all")
    said, others = parser.parse_known_args(arguments)
    failed = []
    for name in said.only:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *others], cwd=HOME).returncode:
            failed.append(name)
    if "--quick" not in others:
        write()
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
