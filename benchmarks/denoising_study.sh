#!/usr/bin/env bash
# What L_DS and L_DV are worth, in which network, at which weight, from when on: the experiment of docs/studies.md.
#
#   benchmarks/denoising_study.sh NETWORK ROWS OUT [d2net study ablation's options]
#
# NETWORK: paper (Sec. 4: three convolutions a stream) or released (residual, dropout, N(0, 0.01) weights).
# ROWS: grid (L_DS and L_DV, their weights and starts), cures (settings that might mend them), or winners (few rows, on
# the test people, once). The recordings are the hard ones of `watch`; each of the seven training people is left out in
# turn, and the test people are used by `winners` alone. Embeddings are as wide as a stream, which residual layers need.
# A training takes about 6 s on one core, `grid` 1 hour. Given again, it goes on where it stopped.
set -euo pipefail
network="$1" rows="$2" out="$3"
shift 3
declare -A model=(
  [paper]="model.dropout=0"
  [released]="model.residual=true model.dropout=0.7 model.dropout_embeddings=true model.weight_std=0.01"
)
iterations=500
half="training.denoising_start=$((iterations / 2))"
sets=(model.embedding_dim=48 training.iterations=$iterations training.ema_decay=0 training.max_snippets=150)
sets+=(watch.difficulty=hard)
for each in ${model[$network]}; do sets+=("$each"); done

options=(--cross-validate --seeds 5)
variants=()
variant() { variants+=(--variant "$1: loss.alpha_snippet=$2 loss.alpha_video=$3 ${*:4}"); }
variant dis 0 0
case "$rows" in
  grid)
    variant cross-entropy 0 0 loss.classification=cross_entropy
    variant focal 0 0 loss.classification=focal
    variant ds-start 0.2 0
    variant ds-half 0.2 0 "$half"
    for weight in 0.001 0.01 0.1; do
      variant "dv$weight-start" 0 $weight
      variant "dv$weight-half" 0 $weight "$half"
      variant "both$weight-start" 0.2 $weight
      variant "both$weight-half" 0.2 $weight "$half"
    done
    ;;
  cures)
    variant ds-half 0.2 0 "$half"
    variant ds-agreed 0.2 0 training.denoising_agreement=0.9
    variant ds-oriented 0.2 0 loss.snippet_oriented=true
    variant ds-half-per-class 0.2 0 "$half" loss.snippet_normalization=per_class
    variant dv0.01-half 0 0.01 "$half"
    variant dv0.01-half-queue 0 0.01 "$half" loss.video_queue=40
    variant um 0 0 loss.um_weight=1
    variant um-unit 0 0 loss.um_weight=1 loss.um_margin_unit=embedding loss.um_margin=2
    ;;
  winners)
    variant cross-entropy 0 0 loss.classification=cross_entropy
    variant focal 0 0 loss.classification=focal
    variant ds-half 0.2 0 "$half"
    options=(--seeds 5)
    ;;
  *)
    echo "ROWS is '$rows'; give grid, cures or winners" >&2
    exit 2
    ;;
esac
exec python -m d2net study ablation --data watch "${options[@]}" --threads 1 --device cpu --out "$out" \
  "${sets[@]/#/--set=}" "${variants[@]}" "$@"
