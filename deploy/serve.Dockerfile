# The page that streams (python -m rcm_jax.serve) in a container, from a checkout:
#
#   docker build -f deploy/serve.Dockerfile -t rcm_jax-serve .        CPUs alone: --build-arg EXTRAS=serve,wan
#   docker run --rm --init --gpus all -p 8000:8000 -e RCM_JAX_TOKEN -v rcm_jax-programs:/programs rcm_jax-serve
#
# Flags of the command come last: … rcm_jax-serve --dit_path /weights/student.safetensors. Readers need the token, which
# is in the environment; without one a new one is printed. --stop-timeout must be above --grace (10 seconds).
FROM python:3.12.11-slim-bookworm AS base

FROM base AS build
WORKDIR /checkout
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM base
ARG EXTRAS=serve,wan,cuda
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "rcm_jax[${EXTRAS}] @ file://$(echo /wheels/*.whl)" \
    && useradd --uid 10001 --create-home rcm_jax \
    && install -d -o rcm_jax /programs
USER 10001
WORKDIR /home/rcm_jax
# compiled programs outlive the container
ENV PYTHONUNBUFFERED=1 RCM_JAX_CACHE=/programs
VOLUME /programs
EXPOSE 8000
# loading and compiling a large network takes minutes, in which it is not yet unhealthy
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "rcm_jax.serve", "--host", "0.0.0.0", "--port", "8000"]
