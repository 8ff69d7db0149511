#!/bin/sh
# sh run.sh demo   installs into .venv and runs the main job: a trained network becomes a spiking one
# sh run.sh test   installs into .venv and runs the checks and the tests
set -eu
cd "$(dirname "$0")"
python="${PYTHON:-python3}"

install() {
    if ! [ -x .venv/bin/python ]; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "error: Python 3.10 or newer is needed, name one with PYTHON=..." >&2
            exit 2
        }
        "$python" -m venv .venv
    fi
    .venv/bin/python -m pip install -q -r "$1"
}

case "${1:-}" in
demo)
    install requirements.txt
    .venv/bin/python ann2snn.py example_net --weight_bitwidth 4 --timesteps 16 --finetune_epochs 30 \
        --ann_weight checkpoint/example_net_ann.pth --save_file out_snn.pth
    ;;
test)
    install requirements-test.txt
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow"
    .venv/bin/python -m pytest -n 2 --dist loadfile -m slow
    ;;
*)
    echo "error: say what to do, sh run.sh demo or sh run.sh test" >&2
    exit 2
    ;;
esac
