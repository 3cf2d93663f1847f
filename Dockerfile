# syntax=docker/dockerfile:1
# docker build --target cpu --tag mlmkit:cpu .      docker build --target cuda --tag mlmkit:cuda .

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mlmkit mlmkit
COPY export export
COPY eval eval
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# The dependencies have their own layer, so a change to the code does not install them again.
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        print(*project["dependencies"], *project["optional-dependencies"]["serve"], sep="\n")' > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
RUN useradd --uid 10001 --create-home mlmkit
WORKDIR /home/mlmkit
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["mlmkit", "serve", "/model", "--host", "0.0.0.0"]

# CUDA's libraries come as the wheels that onnxruntime-gpu itself names, so their versions always match.
FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --no-cache-dir --constraint /build/constraints.txt 'onnxruntime-gpu[cuda,cudnn]'
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
USER 10001

FROM base AS cpu
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-cache-dir --no-deps /wheels/*.whl
USER 10001
