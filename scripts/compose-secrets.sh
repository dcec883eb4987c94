#!/usr/bin/env bash
# Makes what docker-compose.yaml mounts and a clone lacks: the passwords in secrets/, those that are there stay, and the
# folders of jobs and stop files, which the container engine would make as root's. The folder of secrets is closed to other
# users; the files in it are readable, since they are mounted as they are into containers that run as somebody else.
set -euo pipefail
cd "$(dirname "$0")/.."

mkdir -p secrets config_versions config
chmod 700 secrets
for name in redis_password store_id store_secret; do
    if [ ! -s "secrets/$name" ]; then
        # 24 letters and digits: safe in every configuration file, and as long as MinIO allows and more.
        text=$(head -c 512 /dev/urandom | LC_ALL=C tr -dc 'A-Za-z0-9' | head -c 24 || true)
        [ "${#text}" -eq 24 ] || { echo "no random letters from /dev/urandom" >&2; exit 1; }
        printf '%s' "$text" >"secrets/$name.part"
        mv "secrets/$name.part" "secrets/$name"
        echo "secrets/$name is new"
    fi
    # Also where it was made by hand, or by an earlier version that let nobody write it.
    chmod 644 "secrets/$name"
done
