#!/bin/bash -eu
# What OSS-Fuzz calls: $CC, $CXX, $CFLAGS, $CXXFLAGS, $LIB_FUZZING_ENGINE and $OUT are set there. llama-cpp-python must be
# installed for $PYTHON, which the image's Dockerfile does. Not run on OSS-Fuzz yet.
cd "$(dirname "$0")/../../.."
python=${PYTHON:-python3}
site=$($python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
cmake -S native/tests -B build/oss-fuzz -DQAP_SANITIZE= -DQAP_FUZZ=ON -DQAP_FUZZ_ENGINE="$LIB_FUZZING_ENGINE" \
    -DCMAKE_PREFIX_PATH="$site" -DCMAKE_BUILD_RPATH='$ORIGIN/lib' -DQAP_UPSTREAM_VERSION=fuzz
cmake --build build/oss-fuzz --parallel
cp build/oss-fuzz/fuzz/fuzz-* "$OUT/"
mkdir -p "$OUT/lib" && cp -L "$site"/llama_cpp/lib/*.so* "$OUT/lib/"
$python tools/fuzz/coverage_guided.py --seeds "$OUT"
for seeds in "$OUT"/*_seeds; do (cd "$seeds" && zip -q "${seeds%_seeds}_seed_corpus.zip" ./*); done
