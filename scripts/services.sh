#!/usr/bin/env bash
# Makes the real servers of the tests available and prints their places, for `eval "$(scripts/services.sh)"`:
#   BOXWRIGHT_REDIS_SERVER   redis-server, Debian's package (needs root or sudo when it is not there)
#   BOXWRIGHT_S3_SERVER      MinIO where it was built, else s3s-fs
#   BOXWRIGHT_S3_SERVERS     all of these, separated by colons
#   BOXWRIGHT_MLFLOW         the command `mlflow` of an environment of its own
# What a variable names already is kept. Everything else lies below BOXWRIGHT_SERVICES (~/.cache/boxwright-services) and is
# fetched once: s3s-fs by cargo, with the changes of scripts/s3s-fs.sed (1 to 2 minutes), MLflow by pip (1 to 2 minutes), MinIO
# by go (about 5 minutes) only with BOXWRIGHT_MINIO=1. Progress goes to standard error.
#   scripts/services.sh --cached   prints what is there and fetches nothing
# Exit code 1 when something could not be had; the rest is printed all the same.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

s3s_version=0.14.1
# Marks that scripts/s3s-fs.sed leaves; the checksum of that file names the place of what was built with it.
s3s_changes=5
mlflow_version=3.17.2
# The community edition is published as source; this is its last state, October 2025 release included.
minio_version=v0.0.0-20260212201848-7aac2a2c5b7c

cached_only=
case "${1:-}" in
'') ;;
--cached) cached_only=1 ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

cache="${BOXWRIGHT_SERVICES:-$HOME/.cache/boxwright-services}"
s3s_place="$cache/s3s-fs-$s3s_version-$(cksum <scripts/s3s-fs.sed | cut -d ' ' -f 1)"
s3s="$s3s_place/bin/s3s-fs"
mlflow="$cache/mlflow-$mlflow_version/bin/mlflow"
minio="$cache/minio-$minio_version/minio"
missing=()
part=
trap '[ -z "$part" ] || rm -rf "$part"' EXIT

say() { printf 'services: %s\n' "$*" >&2; }
show() { printf 'export %s=%q\n' "$1" "$2"; }

# try LIMIT COMMAND...: three attempts of at most LIMIT seconds each.
try() {
    local limit="$1" attempt
    shift
    for attempt in 1 2 3; do
        if timeout --kill-after=10 "$limit" "$@" >&2; then return 0; fi
        say "attempt $attempt of 3 failed: $*"
        if [ "$attempt" -lt 3 ]; then sleep $((attempt * 5)); fi
    done
    return 1
}

# Nothing for root; nothing and false where there is no way to be root.
as_root=()
can_be_root() {
    if [ "$(id -u)" -eq 0 ]; then return 0; fi
    as_root=(sudo --non-interactive)
    command -v sudo >/dev/null 2>&1 && sudo --non-interactive true 2>/dev/null
}

apt_install() {
    local policy=/usr/sbin/policy-rc.d ours='' result=0
    if ! command -v apt-get >/dev/null 2>&1 || ! can_be_root; then
        say "to install $* is for root, on a system with apt-get"
        return 1
    fi
    local apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=120)
    # The tests start servers themselves: none is to be started by its package.
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null && "${as_root[@]}" chmod 755 "$policy" && ours=1
    fi
    { try 300 "${apt[@]}" update && try 600 "${apt[@]}" install -y --no-install-recommends "$@"; } || result=1
    if [ -n "$ours" ]; then "${as_root[@]}" rm -f "$policy"; fi
    return "$result"
}

# A folder beside the place of what is fetched, moved there when it is complete.
begin() {
    [ -z "$part" ] || rm -rf "$part"
    part=$(mktemp -d "$cache/part.XXXXXX")
}
commit() {
    rm -rf "$1" && mv "$part" "$1" && part=
}

get_redis() {
    say "installing redis-server"
    apt_install redis-server
}

get_s3s() {
    say "building s3s-fs $s3s_version"
    if ! command -v cargo >/dev/null 2>&1; then
        say "there is no cargo to build it with"
        return 1
    fi
    begin
    # A project that needs it brings its source into cargo's registry.
    local probe="$part/probe" source='' folder
    mkdir -p "$probe/src" && touch "$probe/src/lib.rs"
    printf '[package]\nname = "probe"\nversion = "0.0.0"\nedition = "2021"\n[dependencies]\ns3s-fs = "=%s"\n[workspace]\n' \
        "$s3s_version" >"$probe/Cargo.toml"
    CARGO_NET_RETRY=5 try 300 cargo fetch --quiet --manifest-path "$probe/Cargo.toml" || return 1
    for folder in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"s3s-fs-$s3s_version"; do
        if [ -d "$folder" ]; then source="$folder"; fi
    done
    if [ -z "$source" ]; then
        say "cargo fetched s3s-fs and it is not in its registry"
        return 1
    fi
    cp -r "$source" "$part/source"
    sed -i -f scripts/s3s-fs.sed "$part/source/src/s3.rs"
    if [ "$(grep -c '// changed' "$part/source/src/s3.rs")" -ne "$s3s_changes" ]; then
        say "scripts/s3s-fs.sed does not fit s3s-fs $s3s_version"
        return 1
    fi
    # A build folder of its own: the program's would be locked meanwhile, and keep what is not its own.
    CARGO_TARGET_DIR="$part/build" CARGO_NET_RETRY=5 try 1800 cargo install --path "$part/source" --locked \
        --features binary --root "$part" --quiet || return 1
    rm -rf "$part/build" "$part/source" "$part/probe"
    "$part/bin/s3s-fs" --version >&2 && commit "$s3s_place"
}

get_mlflow() {
    say "installing MLflow $mlflow_version"
    local place="$cache/mlflow-$mlflow_version" pip
    # Commands in an environment name their interpreter by its place, so it is made where it stays; the mark says that it is
    # complete.
    rm -rf "$place"
    if python3 -m venv "$place" >/dev/null 2>&1 || { apt_install python3-venv && python3 -m venv --clear "$place" >&2; }; then
        pip=("$place/bin/python" -m pip)
    elif rm -rf "$place" && python3 -m venv --without-pip "$place" >&2; then
        pip=(python3 -m pip --python "$place/bin/python")
    else
        say "python3 makes no environment; Debian's package python3-venv does that"
        return 1
    fi
    try 900 "${pip[@]}" install --quiet --disable-pip-version-check --no-input --no-compile --retries 5 --timeout 30 \
        "mlflow==$mlflow_version" || return 1
    timeout 120 "$mlflow" --version >&2 && touch "$place/complete"
}

get_minio() {
    say "building MinIO $minio_version"
    begin
    GOBIN="$part" GOFLAGS=-buildvcs=false try 1800 go install "github.com/minio/minio@$minio_version" || return 1
    "$part/minio" --version >&2 && commit "$cache/minio-$minio_version"
}

# have NAME TEST GET: true when it is there, or could be had.
have() {
    local name="$1" test="$2" get="$3"
    if "$test"; then return 0; fi
    if [ -n "$cached_only" ]; then return 1; fi
    mkdir -p "$cache"
    # One at a time; who waited finds it there.
    exec 9>"$cache/lock"
    flock --timeout 3600 9
    if "$test" || "$get"; then
        exec 9>&-
        "$test" && return 0
    fi
    exec 9>&-
    say "$name is not to be had"
    missing+=("$name")
    return 1
}

is_redis_there() { command -v redis-server >/dev/null 2>&1; }
is_s3s_there() { [ -x "$s3s" ]; }
is_mlflow_there() { [ -x "$mlflow" ] && [ -e "$cache/mlflow-$mlflow_version/complete" ]; }
is_minio_there() { [ -x "$minio" ]; }

if [ -n "${BOXWRIGHT_REDIS_SERVER:-}" ]; then
    show BOXWRIGHT_REDIS_SERVER "$BOXWRIGHT_REDIS_SERVER"
elif have redis-server is_redis_there get_redis; then
    show BOXWRIGHT_REDIS_SERVER "$(command -v redis-server)"
fi

if [ -n "${BOXWRIGHT_S3_SERVER:-}" ]; then
    show BOXWRIGHT_S3_SERVER "$BOXWRIGHT_S3_SERVER"
    show BOXWRIGHT_S3_SERVERS "${BOXWRIGHT_S3_SERVERS:-$BOXWRIGHT_S3_SERVER}"
else
    stores=()
    if is_minio_there; then
        stores+=("$minio")
    elif [ "${BOXWRIGHT_MINIO:-}" = 1 ] && [ -z "$cached_only" ]; then
        if ! command -v go >/dev/null 2>&1; then
            say "BOXWRIGHT_MINIO=1, and there is no go to build MinIO with"
            missing+=(minio)
        elif have minio is_minio_there get_minio; then
            stores+=("$minio")
        fi
    fi
    if have s3s-fs is_s3s_there get_s3s; then stores+=("$s3s"); fi
    if [ "${#stores[@]}" -gt 0 ]; then
        show BOXWRIGHT_S3_SERVER "${stores[0]}"
        show BOXWRIGHT_S3_SERVERS "$(IFS=:; printf '%s' "${stores[*]}")"
    fi
fi

if [ -n "${BOXWRIGHT_MLFLOW:-}" ]; then
    show BOXWRIGHT_MLFLOW "$BOXWRIGHT_MLFLOW"
elif have mlflow is_mlflow_there get_mlflow; then
    show BOXWRIGHT_MLFLOW "$mlflow"
fi

[ "${#missing[@]}" -eq 0 ]
