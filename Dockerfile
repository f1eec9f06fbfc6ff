# syntax=docker/dockerfile:1
# The server of lasar, for CPUs; the model is mounted, not baked in. Build in a checkout:  docker build -t lasar .
# Run:  docker run -p 8000:8000 -v "$PWD/shop:/model:ro" -v lasar-state:/state -e LASAR_ADMIN_TOKEN lasar

FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
WORKDIR /src
# What the code needs changes less often than the code: installed first, so that it stays in the build cache.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY lasar/__init__.py lasar/__init__.py
# CPU builds of torch are a tenth of the size of the default ones.
RUN /venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu -c constraints.txt '.[serve,embed]'
COPY lasar lasar
RUN /venv/bin/pip install --no-deps --force-reinstall .

FROM python:3.11-slim
# OpenMP, which torch loads.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --no-create-home lasar && install -d -o lasar -g lasar /state
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp
USER 10001
VOLUME /state
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["lasar", "serve", "/model", "--host", "0.0.0.0", "--port", "8000", "--database", "sqlite:////state/state.sqlite"]
