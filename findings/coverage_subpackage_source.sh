#!/usr/bin/env bash
# coverage.py 7.17.3 with NumPy 2.4.6: measuring a subpackage makes the program under test fail, measuring its parent
# does not.
#
# The guess: `coverage run --source=p.sub` only says which files count; the program itself runs as without coverage.
# What happens: to learn where p.sub lies, coverage imports the parent p before the program starts, and then takes what
# that brought in out of sys.modules again. The program's own import is the second in one process. Python modules do not
# mind; extension modules that allow one initialization per process do: NumPy answers "cannot load module more than once
# per process" (torch fails likewise). With --source=p the parent's parent is nobody, nothing is imported, all is well.
# So measure the whole package and leave out what should not count (`--include`, `[run] omit`).
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT; cd "$dir"
python3 -m venv env
env/bin/python -m pip install -q --disable-pip-version-check coverage==7.17.3 numpy==2.4.6
mkdir -p p/sub
echo 'import numpy' > p/__init__.py
: > p/sub/__init__.py
echo 'import p.sub; print("ran")' > program.py

whole=$(env/bin/coverage run --source=p program.py 2>&1) || true
part=$(env/bin/coverage run --source=p.sub program.py 2>&1) || true
echo "--source=p:     $whole"
echo "--source=p.sub: $(grep -o 'ImportError.*' <<<"$part" || echo "$part")"
[ "$whole" = ran ] || { echo "changed: measuring the whole package fails now"; exit 1; }
grep -q 'ImportError: cannot load module more than once per process' <<<"$part" \
  || { echo "changed: measuring the subpackage works now"; exit 1; }
echo "as described"
