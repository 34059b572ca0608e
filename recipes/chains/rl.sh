#!/usr/bin/env bash
# The place of an RL program in a chain: rl.sh PIPELINE FOLDER. Put its command where the stand-in is.
set -euo pipefail
pipeline=$1 folder=$2

# accelerate launch train_sd3.py --config config/grpo.py:soar --config.pretrained.model="$pipeline" --config.save_dir="$folder"
[[ -e $pipeline/model_index.json ]] # stand-in: looks at what RL would start from

# what the chain trusts comes last
echo "{\"pipeline\": \"$pipeline\"}" > "$folder/started_from.json"
