# syntax=docker/dockerfile:1
# Two images of one program: `cpu` and `gpu` (with NVIDIA's run-time compiler; the driver comes from the host).
#   docker build --target cpu -t boxwright:0.1.0-cpu .
#   docker build --target gpu -t boxwright:0.1.0-gpu .

FROM rust:1.95-slim-bookworm AS build
# The C compiler builds the embedded database.
RUN apt-get update && apt-get install -y --no-install-recommends build-essential && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --release --locked --bin boxwright && \
    install -D target/release/boxwright /out/boxwright && strip --strip-debug /out/boxwright

# The compiler of the kernels, at the version that the tests use.
FROM debian:bookworm-slim AS nvrtc
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-pip && rm -rf /var/lib/apt/lists/*
COPY scripts/nvrtc.sh /src/scripts/nvrtc.sh
RUN CARGO_TARGET_DIR=/fetched /src/scripts/nvrtc.sh && mv /fetched/nvrtc-*/nvidia/cu13/lib /nvrtc

FROM debian:bookworm-slim AS cpu
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates tzdata && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/boxwright --shell /usr/sbin/nologin boxwright && \
    install -d -m 1777 -o boxwright -g boxwright /var/lib/boxwright /var/cache/boxwright
COPY --from=build /out/boxwright /usr/local/bin/boxwright
COPY configs/service/boxwright.yaml /etc/boxwright/boxwright.yaml
ENV XDG_CACHE_HOME=/var/lib/boxwright/cache
USER 10001:10001
# Relative folders of the configuration (state, runs, logs) lie here.
WORKDIR /var/lib/boxwright
ENTRYPOINT ["boxwright"]
CMD ["run", "--service", "/etc/boxwright/boxwright.yaml"]

FROM cpu AS gpu
COPY --from=nvrtc /nvrtc /usr/local/lib/nvrtc
ENV BOXWRIGHT_NVRTC=/usr/local/lib/nvrtc \
    BOXWRIGHT_KERNEL_CACHE=/var/cache/boxwright/kernels \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
