#!/usr/bin/env bash
# Everything that is checked on one GPU, side by side, in about five minutes. It prints a summary last and writes
# benchmarks/results/<date>-<gpu>-check.json, from which tools/gpu_page.py makes docs/gpu.md. Exit code 0: all passed;
# 1: something failed; 2: nothing was run, as there is no CUDA device or an argument is wrong.
#
#   tools/gpu_check.sh                          in .venv, or where there is none with python3
#   tools/gpu_check.sh kernels models           only parts whose name holds one of these words
#   SOAR_PYTHON=python tools/gpu_check.sh       in the active environment (the Docker image, for instance)
#
# On a machine without network or an installed soar_mega it needs a torch with CUDA, transformers, accelerate,
# scikit-learn, tensorboard, pytest and pytest-timeout. What is in .whl is used besides: wheels, and an archive of
# Transformer Engine (te-*.tar.xz). Filled like this on a machine with network (14 MB, for Python 3.12):
#
#   python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
#       --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 -d .whl -c constraints.txt megatron-core \
#       diffusers webdataset braceexpand hjson pydantic pydantic_core annotated-types typing-inspection \
#       importlib_metadata zipp
#   .venv/bin/python -m pip wheel --no-deps --no-build-isolation -c constraints.txt -w .whl deepspeed
#
# Variables: OUT is a folder that receives the JSON and logs.tar.gz; SOAR_MEGA_COMMIT names the commit of a copy
# whose .git is another's or not there.
set -euo pipefail
for word in "$@"; do
    case $word in
    -h | --help)
        sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"
        exit
        ;;
    -*)
        echo "tools/gpu_check.sh: $word is no option: the arguments are words that parts have in their names" >&2
        exit 2
        ;;
    esac
done
cd "$(dirname "$0")/.."

python=${SOAR_PYTHON:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
carried=$(mktemp -d)
trap 'rm -rf "$carried"' EXIT
if compgen -G '.whl/*.whl' > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$carried" .whl/*.whl
    export PYTHONPATH=$carried:$PYTHONPATH
fi
if compgen -G '.whl/te-*.tar.xz' > /dev/null; then
    mkdir "$carried/te"
    tar xJf .whl/te-*.tar.xz -C "$carried/te"
    export PYTHONPATH=$PYTHONPATH:$carried/te
fi
made=()
for name in kernels examples; do
    if ! "$python" -c "import soar_mega.$name" 2> /dev/null; then
        ln -s "../$name" "soar_mega/$name" # an installed package maps this folder (setup.py)
        made+=("soar_mega/$name")
    fi
done
trap 'rm -rf "$carried" "${made[@]}"' EXIT
"$python" tools/gpu_check.py "$@"
