#!/usr/bin/env bash
# Every sweep behind docs/results.md, on held-out seeds. Hours on few cores; stop it, and it goes on where it was.
#
#   tools/run_sweeps.sh [FOLDER]      default: results; LIMIT=... asks fewer questions than the 2,016 of the main sweeps
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-results}
limit=${LIMIT:-2016}

pruners=(dcp dcp_lookup dcp_progressive random uniform resize cls_attention visionzip holov flowcut prunesid scope score)
pruners+=(mmtok mmtok@lookup divprune vispruner otprune)
six=(dcp divprune scope visionzip prunesid vispruner) # of which the paper draws kappa against accuracy
damaged=(@none @wrong @noise=0.5 @noise=0.85)         # what the pruner reads instead of the question
stage='recovery=1.0,schedule'
variants=(
    dcp_lookup dcp@none 'dcp(space="encoder")' 'dcp(centre_temperature=None)' 'dcp(centre_sigma=None)'
    'dcp(saliency_weight=0.2)' 'dcp(reselect_members=False)' 'dcp(text_affinity=0.0)'
    'dcp(threshold=inf)' 'dcp(threshold=0.2)' 'dcp(threshold=0.4)'
    'dcp(distance="kappa",threshold=0.1)' 'dcp(distance="kappa",threshold=0.2)'
    "dcp($stage=((3,288),))" "dcp($stage=((6,288),))" "dcp($stage=((9,288),))"
    "dcp($stage=((6,192),))" "dcp($stage=((6,96),))" 'dcp(recovery=0.0,schedule=((6,288),))'
    'dcp(recovery=5.0,neighbours=1,schedule=((6,288),))' "dcp($stage=((6,288),),anchors=\"coverage\")"
    "dcp($stage=((6,288),),anchors=\"saliency\")" "dcp($stage=((6,288),),threshold=inf)"
)

fewer() { echo $(($1 < limit ? $1 : limit)); }

sweep() { # folder difficulty questions budgets pruner...
    local options=(--checkpoint natural --output "$results/$1/natural-$2" --difficulty "$2" --limit "$3" --num-tokens "$4")
    shift 4
    .venv/bin/dcp-prune sweep "${options[@]}" "${@/#/--pruner=}" --compact
}

mkdir -p "$results"/{sweeps,ablations,kappa}
sweep sweeps crowded "$limit" 64,32,16,8,0 none "${pruners[@]}"
sweep sweeps cluttered "$limit" 64,32,16,8,0 none "${pruners[@]}"
sweep sweeps crowded "$limit" 16 "${damaged[@]/#/dcp}" "${damaged[@]/#/dcp_lookup}"
sweep ablations crowded "$(fewer 1008)" 16,0 none dcp "${variants[@]}"
sweep kappa crowded "$(fewer 504)" 256,192,128,96,64,48,32,24,16,8,0 none "${six[@]}" random uniform resize
