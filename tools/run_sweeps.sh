#!/usr/bin/env bash
# Every sweep behind docs/results.md, on held-out seeds. Half an hour on two cores; stop it, and it goes on where it was.
#
#   tools/run_sweeps.sh [FOLDER]      default: results; LIMIT=... asks more or fewer questions than the 756 of the main sweep
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-results}
limit=${LIMIT:-756}

pruners=(dcp dcp_lookup dcp_progressive random uniform resize cls_attention visionzip holov flowcut prunesid scope score)
pruners+=(mmtok mmtok@lookup divprune vispruner otprune)
stage='recovery=1.0,schedule'
variants=(
    dcp_lookup 'dcp(confidence_margin=-5.0)@lookup' dcp@none 'dcp(space="encoder")' 'dcp(relevance_power=3.0)'
    'dcp(centre_temperature=None)' 'dcp(reselect_members=False)'
    'dcp(threshold=inf)' 'dcp(distance="kappa",threshold=0.1)'
    "dcp($stage=((3,288),))" "dcp($stage=((6,288),))" "dcp($stage=((9,288),))" "dcp($stage=((6,144),))"
    'dcp(recovery=0.0,schedule=((6,288),))' 'dcp(recovery=5.0,neighbours=1,schedule=((6,288),))'
    "dcp($stage=((6,288),),anchors=\"coverage\")"
)

fewer() { echo $(($1 < limit ? $1 : limit)); }

sweep() { # folder difficulty questions budgets pruner...
    local options=(--checkpoint natural --output "$results/$1/natural-$2" --difficulty "$2" --limit "$3" --num-tokens "$4")
    shift 4
    .venv/bin/dcp-prune sweep "${options[@]}" "${@/#/--pruner=}" --compact
}

mkdir -p "$results"/{sweeps,ablations}
sweep sweeps crowded "$limit" 64,32,16,8,0 none "${pruners[@]}"
sweep sweeps cluttered "$(fewer 504)" 16,8,0 none "${pruners[@]}"
sweep ablations crowded "$(fewer 504)" 16,0 none dcp "${variants[@]}"
