#!/bin/sh
# Print the path of a Python 3.11 or 3.12: find_python.sh [NAME_OR_PATH]. Without a name: the first that works of
# python3, python3.11, python3.12. A name is looked for on PATH, then under pyenv (whose shims exist without working).
# Exit 1 with one line on stderr if there is none.
wanted=$1

usable() {
    "$1" -c 'import sys; print(sys.executable); sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
for name in ${wanted:-python3 python3.11 python3.12}; do
    for candidate in "$name" "$pyenv_root"/versions/"${name#python}"*/bin/"$name"; do
        if found=$(usable "$candidate"); then
            echo "$found"
            exit 0
        fi
    done
done

seen=$("${wanted:-python3}" --version 2>/dev/null) || seen="no working interpreter of that name"
echo "error: Python 3.11 or 3.12 is needed; ${wanted:-python3} is: $seen." \
    "Install one of them, or name it: make install PYTHON=/path/to/python3.12" >&2
exit 1
