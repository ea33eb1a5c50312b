# qap-gguf serve in a container. NOT YET BUILT: no Docker was at hand where this was written.
#
#   docker build -t qap-gguf .
#   docker run --rm -p 8000:8000 -v "$PWD/models:/models:ro" -e QAP_API_KEY=secret \
#       qap-gguf -m /models/model.gguf --mmproj /models/mmproj.gguf
#
# Two stages: compilers stay in the first. For CPUs in general; set LLAMA_ARGS for one machine or for a GPU.
FROM python:3.12-slim AS build
ARG LLAMA_ARGS="-DGGML_NATIVE=OFF -DLLAMA_OPENSSL=OFF"
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends g++ make patch \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN CMAKE_ARGS="$LLAMA_ARGS" python -m pip wheel --quiet --wheel-dir /wheels "/src[serve,hub]"

FROM python:3.12-slim
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home qap
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python -m pip install --quiet --no-cache-dir --no-index --find-links /wheels "qap_gguf[serve,hub]"
USER qap
WORKDIR /tmp
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, 5); c.request('GET', '/health'); exit(c.getresponse().status != 200)"]
# --host: within the container; what reaches it is docker's -p. Set QAP_API_KEY.
ENTRYPOINT ["qap-gguf", "serve", "--host", "0.0.0.0"]
