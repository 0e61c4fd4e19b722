#!/bin/sh
# Install pycuda on a machine without a driver, for the tests marked host_gpu.
#
# Usage: install_pycuda.sh [PYTHON [OPTION OF PIP...]]
#
# pycuda compiles itself against CUDA's headers and links libcuda and libcurand. The headers come
# from CUDA_ROOT (the toolkit) and, for curand.h, from the wheel nvidia-curand that torch brings.
# Empty libraries are enough for linking: at run time the tests replace them with the host driver.
# --no-as-needed makes the linker record them in the module, although they define nothing.
set -eu
python=${1:-python}
[ $# -eq 0 ] || shift
root=${CUDA_ROOT:-/usr/local/cuda}
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for library in cuda:1 curand:10; do
  name=lib${library%:*}.so
  echo | gcc -shared -xc - -Wl,-soname,"$name.${library#*:}" -o "$folder/$name"
done
PATH="$root/bin:$PATH" CUDA_ROOT="$root" CPATH="$site/nvidia/cu13/include" LIBRARY_PATH="$folder" \
  LDFLAGS="${LDFLAGS:-} -Wl,--no-as-needed" "$python" -m pip install "$@" pycuda
