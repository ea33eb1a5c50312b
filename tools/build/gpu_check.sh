#!/usr/bin/env bash
# Compares a GPU with the CPU and times it, on a machine that needs no network: builds ggml and libllama of the pinned
# sources for the GPU, our libmtmd and native/tests/gpu-check, and runs that. The last line is one JSON object.
#
#   tools/build/gpu_check.sh --sources FILE|FOLDER [--backend cuda|metal|vulkan|cpu] [--build FOLDER] [--jobs N]
#                      [--build-only] [-- words for gpu-check, such as --small or --rounds 9]
#   tools/build/gpu_check.sh --sources SDIST --pack FILE.tar.xz
#
#   --sources   the pinned sdist (.tar.gz, its sha256 is checked), what --pack made of it, or either unpacked
#   --backend   default: cuda where nvcc is, metal on macOS, else cpu, which compares with a device that computes on the
#               CPU behind memory of its own
#   --build     default: build/gpu-check-BACKEND; a second run goes on where the first one stopped
#   --pack      write the part of the sdist that is needed here, 3.2 MB instead of 76
#
# Needs bash, cmake >= 3.21, a C++17 compiler, Python >= 3.10 without packages, and for cuda the toolkit with nvcc.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

die() { echo "gpu_check: $1" >&2; exit "${2:-1}"; }
note() { echo "gpu_check: $*" >&2; }

sources="" backend="" build="" pack="" build_only="" words=()
jobs=$(getconf _NPROCESSORS_ONLN 2> /dev/null || echo 4)
while [ $# -gt 0 ]; do
    case $1 in
        --sources | --backend | --build | --pack | --jobs)
            [ $# -ge 2 ] || die "$1 needs a value" 2
            declare "${1#--}=$2"
            shift 2 ;;
        --build-only) build_only=1; shift ;;
        --) shift; words=("$@"); break ;;
        -h | --help) sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        *) die "unknown argument $1; see --help" 2 ;;
    esac
done
[ -n "$sources" ] || die "--sources is needed: the pinned sdist, or what --pack made of it" 2
[ -e "$sources" ] || die "--sources: no such file or folder: $sources"

pin() { sed -n "s/^$1 *= *//p" "$root/native/upstream/PIN"; }

# The sdist's own root in a folder of ours, or the folder that was given.
unpack() {
    local into=$1 got
    [ -d "$sources" ] && { (cd "$sources" && pwd); return; }
    if [ ! -e "$into/.unpacked" ] || [ "$(cat "$into/.unpacked")" != "$(pin commit)" ]; then
        case $sources in
            *.tar.gz)
                got=$( (sha256sum "$sources" 2> /dev/null || shasum -a 256 "$sources") | cut -d' ' -f1)
                [ "$got" = "$(pin sha256)" ] || die "--sources: expected sha256 $(pin sha256), got $got; bring the pinned sdist" ;;
            *.tar.xz) ;;
            *) die "--sources: expected .tar.gz, .tar.xz or a folder, got $sources" 2 ;;
        esac
        note "unpacking $sources"
        rm -rf "$into" && mkdir -p "$into"
        tar -xf "$sources" -C "$into" --strip-components=1
        pin commit > "$into/.unpacked"
    fi
    echo "$into"
}

if [ -n "$pack" ]; then
    [ ! -e "$pack" ] || die "--pack: $pack exists; remove it first"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    tree=$(unpack "$work/sdist")
    mkdir -p "$work/pinned/vendor/llama.cpp" "$work/pinned/.git/modules/vendor/llama.cpp" "$work/pinned/llama_cpp"
    cp "$tree/llama_cpp/__init__.py" "$work/pinned/llama_cpp/"
    cp "$tree/.git/modules/vendor/llama.cpp/HEAD" "$work/pinned/.git/modules/vendor/llama.cpp/"
    (cd "$tree/vendor/llama.cpp" && tar -cf - LICENSE CMakeLists.txt cmake include src ggml tools/mtmd vendor) |
        tar -xf - -C "$work/pinned/vendor/llama.cpp"
    for other in cann et hexagon musa opencl openvino rpc sycl virtgpu webgpu zdnn zendnn; do
        rm -rf "$work/pinned/vendor/llama.cpp/ggml/src/ggml-$other"
    done
    find "$work/pinned/vendor/llama.cpp/tools/mtmd" "$work/pinned/vendor/llama.cpp/vendor" -type f \
        \( -name '*.jpeg' -o -name '*.mp3' -o -name '*.png' \) -delete
    tar -C "$work" -cJf "$pack.part" pinned && mv "$pack.part" "$pack"
    note "$pack: $(($(wc -c < "$pack") / 1024)) KiB"
    exit 0
fi

if [ -z "$backend" ]; then
    if command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
        backend=cuda
    elif [ "$(uname)" = Darwin ]; then
        backend=metal
    else
        backend=cpu
    fi
fi
build=${build:-$root/build/gpu-check-$backend}
flags=(-DGGML_METAL=OFF) toolkit=none
case $backend in
    cuda)
        nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
        [ -x "$nvcc" ] || die "cuda: expected nvcc, found none; install the CUDA toolkit or say --backend cpu"
        card=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ') ||
            die "cuda: nvidia-smi finds no card; say --backend cpu"
        flags+=(-DGGML_CUDA=ON -DCMAKE_CUDA_COMPILER="$nvcc" -DCMAKE_CUDA_ARCHITECTURES="$card")
        toolkit=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
        export NVIDIA_TF32_OVERRIDE="${NVIDIA_TF32_OVERRIDE:-0}" ;; # cuBLAS would compute f32 with 10 bits; the limits are for f32
    metal) flags=(-DGGML_METAL=ON -DGGML_METAL_EMBED_LIBRARY=ON) ;;
    vulkan) flags+=(-DGGML_VULKAN=ON) ;;
    cpu) ;;
    *) die "--backend: expected cuda, metal, vulkan or cpu, got $backend" 2 ;;
esac

mkdir -p "$build"
build=$(cd "$build" && pwd)
tree=$(unpack "$build/sources")
llama=$tree/vendor/llama.cpp
[ -d "$llama" ] || llama=$tree
[ -f "$llama/ggml/src/ggml-backend-impl.h" ] || die "--sources: expected llama.cpp with ggml/src in $tree, found none"

note "building ggml and libllama for $backend in $build"
cmake -S "$llama" -B "$build/llama" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF \
    -DLLAMA_BUILD_APP=OFF -DCMAKE_INSTALL_PREFIX="$build/install" "${flags[@]}" > "$build/llama-configure.log" 2>&1 ||
    die "cmake refused; see $build/llama-configure.log"
cmake --build "$build/llama" -j "$jobs" > "$build/llama-build.log" 2>&1 || die "the build failed; see $build/llama-build.log"
cmake --install "$build/llama" > "$build/llama-install.log"

note "building libqap-mtmd and gpu-check"
cmake -S "$root" -B "$build/qap" -DCMAKE_BUILD_TYPE=Release -DQAP_CHECKER=ON -DQAP_WERROR=ON \
    -DQAP_UPSTREAM_DIR="$tree" -DQAP_GGML_SOURCE_DIR="$llama/ggml/src" -DCMAKE_PREFIX_PATH="$build/install" \
    -DCMAKE_BUILD_RPATH="$build/install/lib" > "$build/qap-configure.log" 2>&1 ||
    die "cmake refused; see $build/qap-configure.log"
cmake --build "$build/qap" -j "$jobs" --target gpu-check > "$build/qap-build.log" 2>&1 ||
    die "the build failed; see $build/qap-build.log"
[ -z "$build_only" ] || exit 0

commit=$(git -C "$root" describe --always --dirty --exclude '*' 2> /dev/null || echo unknown)
mkdir -p "$build/models"
LD_LIBRARY_PATH="$build/install/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$build/qap/gpu-check" \
    --packaged "$root/python/qap_gguf/models/tiny_llava" --work "$build/models" --threads "$jobs" \
    --tag backend="$backend" --tag toolkit="$toolkit" --tag commit="$commit" --tag llama.cpp="$(pin commit)" \
    --tag tf32="${NVIDIA_TF32_OVERRIDE:-default}" "${words[@]+"${words[@]}"}"
