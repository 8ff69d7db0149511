#!/bin/sh
# Do the lines of docs/export.md make importers of NIR exact? Each is installed into a virtual environment of its own.
#     sh tools/check_importers.sh                    nirtorch spikingjelly sinabs snntorch norse
#     sh tools/check_importers.sh nirtorch sinabs    only these
# The environments see the packages of $PYTHON (python3), torch among them. Ends with status 1 if a spike differs.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
[ "$#" -gt 0 ] || set -- nirtorch spikingjelly sinabs snntorch norse
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM
base="$("$python" -c 'import torch, os; print(os.path.dirname(os.path.dirname(torch.__file__)))')"

packages() { # without dependencies: sinabs and SpikingJelly ask for different versions of nir
    case "$1" in
    nirtorch) ;;
    spikingjelly) echo "spikingjelly==2.0.0 loguru requests certifi charset-normalizer idna urllib3" ;;
    sinabs) echo "sinabs==3.1.3 pbr setuptools" ;;
    snntorch) echo "snntorch==1.0.0" ;;
    norse) echo "norse==1.1.0" ;;
    *)
        echo "error: unknown importer $1, use nirtorch, spikingjelly, sinabs, snntorch or norse" >&2
        exit 2
        ;;
    esac
}

for importer in "$@"; do
    packages "$importer" >"$folder/needs"
done
failed=0
export TQDM_DISABLE=1
for importer in "$@"; do
    environment="$folder/$importer"
    "$python" -m venv "$environment"
    site="$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    echo "$base" >"$site/base.pth"
    packages "$importer" >"$folder/needs"
    # shellcheck disable=SC2046
    "$environment/bin/python" -m pip install -q --no-deps --ignore-installed nir==1.0.8 nirtorch==2.6 h5py $(cat "$folder/needs")
    "$environment/bin/python" tools/check_importer.py "$importer" || failed=1
    rm -rf "$environment"
done
exit "$failed"
