#!/usr/bin/env bash
# Every sweep behind docs/results.md, on held-out seeds. Hours on few cores; stop it, and it goes on where it was.
#
#   tools/run_sweeps.sh [FOLDER]      default: results; LIMIT=... asks fewer questions than the 4,004 of the main sweeps
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-results}
limit=${LIMIT:-4004}

pruners=(random uniform resize cls_attention visionzip holov flowcut prunesid scope score mmtok divprune vispruner otprune)
damaged=(@wrong @noise=0.5 @noise=0.7 @noise=0.85 @noise=1) # what the pruner reads instead of the question
stages='schedule=((0.5,0.5),(0.75,0.25))'
variants=(
    dcp@none 'dcp(centre_temperature=None)' 'dcp(centre_sigma=None)' 'dcp(saliency_weight=0.2)'
    'dcp(reselect_members=False)' 'dcp(threshold=inf)'
    'dcp(threshold=0.15)' 'dcp(schedule=((0.75,0.5),))' 'dcp(schedule=((0.75,0.5),),recovery=1.0)' "dcp($stages)"
    "dcp($stages,recovery=0.3)" "dcp($stages,recovery=1.0)" "dcp($stages,recovery=1.0,rescale=False)"
    "dcp($stages,anchors=\"saliency\")"
)
# Bounds that keep 8, 12, 16 and 32 tokens (coverage: 8 and 16) in the mean of crowded tuning seeds 900040000 to 900040071.
demand=(0.544 0.451 0.403 0.306)
coverage=(0.168 0.11)

fewer() { echo $(($1 < limit ? $1 : limit)); }

sweep() { # folder checkpoint difficulty questions budgets pruner...
    local options=(--output "$results/$1/$2-$3" --checkpoint "$2" --difficulty "$3" --limit "$4" --num-tokens "$5")
    shift 5
    .venv/bin/dcp-prune sweep "${options[@]}" "${@/#/--pruner=}" --compact "${extra[@]}"
}

mkdir -p "$results"/{sweeps,distances,ablations,adaptive,tiles}
extra=()
sweep sweeps natural crowded "$(fewer 1008)" 64,32,16,8,0 none dcp dcp_progressive "${pruners[@]}"
sweep sweeps natural cluttered "$(fewer 504)" 64,32,16,8,0 none dcp dcp_progressive "${pruners[@]}"
extra=()
sweep sweeps weak crowded "$limit" 64,32,16,8,0 none dcp dcp_progressive "${pruners[@]}"
sweep sweeps weak crowded "$limit" 16,8 dcp@none
sweep sweeps weak crowded "$limit" 16 "${damaged[@]/#/dcp}" "${damaged[@]/#/mmtok}"
sweep sweeps weak standard "$limit" 16,0 none dcp dcp_progressive "${pruners[@]}"
sweep ablations weak crowded "$(fewer 1008)" 16,0 none dcp "${variants[@]}"
adaptive=()
for bound in "${demand[@]}"; do adaptive+=("dcp(max_distance=$bound,num_tokens=(4,64))"); done
for bound in "${coverage[@]}"; do
    adaptive+=("dcp(max_distance=$bound,bounded=\"coverage\",num_tokens=(4,64))")
done
sweep adaptive weak crowded "$(fewer 1008)" 6,7,8,9,10,11,12,13,14,15,16,17,31,32,33 none dcp "${adaptive[@]}"
sweep adaptive weak standard "$(fewer 1008)" 4,5,6,7,8,9,10,11,12,13,14 none dcp "${adaptive[@]:0:3}"
extra=(--distances)
sweep distances weak crowded "$(fewer 1008)" 192,128,64,32,16,8,0 none dcp "${pruners[@]}"
sweep distances weak standard "$(fewer 252)" 192,128,64,32,16,8,0 none dcp "${pruners[@]}"
extra=(--tiles)
sweep tiles weak crowded "$(fewer 406)" 80,40,20,0 none dcp dcp_progressive "${pruners[@]}"
.venv/bin/python tools/measure_tile_views.py --limit "$(fewer 140)" --json "$results/tile-views.json"
