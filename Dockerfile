# Two images from one file. The default holds torch's CPU build; `--build-arg LOCK=cuda` its CUDA build.
# Plain Dockerfile syntax, so that any builder takes it. The release workflow pins the base by digest.

FROM debian:bookworm-slim AS base
# Debian withdraws a package's old version when it mends it: a pinned version stops building one day.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*


# pip lives outside the environment it fills, and stays behind.
FROM base AS pip
# hadolint ignore=DL3008,DL3009
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && python3 -m venv /pip \
    && python3 -m venv --without-pip /opt/smolquant
ENV PIP_PYTHON=/opt/smolquant/bin/python PIP_NO_CACHE_DIR=1


FROM pip AS dependencies
# cpu or cuda: the lock in requirements/ that is installed.
ARG LOCK=cpu
# Where torch's CPU build is found; empty leaves it to pip's own configuration, and where that does
# not know the build, to its public index.
ARG TORCH_INDEX=
COPY requirements/${LOCK}.txt /lock.txt
RUN install() { \
        /pip/bin/pip install --no-compile --only-binary :all: --require-hashes -r /lock.txt "$@"; \
    }; \
    if [ -n "$TORCH_INDEX" ]; then install --extra-index-url "$TORCH_INDEX"; \
    else install || install --extra-index-url https://download.pytorch.org/whl/cpu; fi

# What only serves building and testing these packages goes. Byte code is compiled here, once, and
# trusted without a look at time stamps, which a reproducible build may rewrite. (torch carries files
# in Python 3.12's syntax.)
WORKDIR /opt/smolquant/lib/python3.11/site-packages
RUN rm -rf test torch/include torch/share torch/test \
    && find torch/bin -type f ! -name torch_shm_manager -delete \
    && find . -type d -name tests -prune -exec rm -rf {} + \
    && find . -name '*.a' -delete \
    && /opt/smolquant/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x py312_ .


FROM dependencies AS product
# hadolint ignore=DL3008,DL3009
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
# A release's image holds the wheel that PyPI has: --build-arg PRODUCT=smolquant==X.Y.Z, with the wheels in
# dist/. (The folder may be missing, which COPY allows where it finds another file to copy.)
ARG PRODUCT=/src
COPY pyproject.toml README.md LICENSE setup.py /src/
COPY entrypoint /src/entrypoint
COPY pyproject.toml dist/*.whl /dist/
RUN /pip/bin/pip install --no-compile --no-index --find-links /dist --no-deps --no-build-isolation \
        --prefix /product "$PRODUCT" \
    && /opt/smolquant/bin/python -m compileall -q --invalidation-mode unchecked-hash /product
COPY entrypoint/smolquant-cleanup /product/bin/


# The product is a layer of its own: a new version of it leaves the gigabyte below as it was.
FROM base
COPY --from=dependencies /opt/smolquant /opt/smolquant
COPY --from=product /product /opt/smolquant
# Any user may have its caches in the home folder, which on a runner is this one, too.
RUN ln -s /opt/smolquant/bin/smolquant /usr/local/bin/smolquant \
    && mkdir -p /github/home && chmod 1777 /github/home
ENV HOME=/github/home

ARG VERSION=dev
ARG REVISION=unknown
# The image that a GPU sibling runs, of the same version; only a release has one.
ARG CUDA_IMAGE=
LABEL org.opencontainers.image.title="smolquant" \
      org.opencontainers.image.description="Quantize Hugging Face language models with torchao, measure what it cost, publish the variants" \
      org.opencontainers.image.source="https://github.com/org/smolquant-action" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT AND BSD-3-Clause" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim" \
      smolquant.cuda-image="${CUDA_IMAGE}"

WORKDIR /github/workspace
# Where the runner says nothing else, as for a `docker run` by hand: whose folder the output belongs to.
ENV GITHUB_WORKSPACE=/github/workspace
# No shell: it would drop INPUT_QUANT-TYPE, whose name no shell variable can have. -I keeps the
# workspace and the workflow's PYTHON* variables out of what is imported, -u shows each line as it is made.
ENTRYPOINT ["/opt/smolquant/bin/python", "-I", "-u", "-m", "smolquant"]
