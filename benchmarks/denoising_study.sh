#!/usr/bin/env bash
# What L_DS and L_DV are worth, in which network, at which weight, from when on: the experiment of docs/studies.md.
#
#   benchmarks/denoising_study.sh NETWORK OUT [d2net study ablation's options]
#
# NETWORK is paper (Sec. 4: three convolutions a stream) or released (residual, dropout, N(0, 0.01) weights). The
# recordings are the hard ones of `watch`; each of the seven training people is left out in turn, with five seeds. The
# test people are not used. Embeddings are as wide as a stream, which residual layers need. About 9 s a training on one core:
# 17 variants x 35 trainings take 90 minutes, a network a core. Given again, it goes on where it stopped.
set -euo pipefail
network="$1" out="$2"
shift 2
declare -A model=(
  [paper]="model.dropout=0"
  [released]="model.residual=true model.dropout=0.7 model.dropout_embeddings=true model.weight_std=0.01"
)
iterations=500
half="training.denoising_start=$((iterations / 2))"
sets=(model.embedding_dim=48 training.iterations=$iterations training.ema_decay=0 training.max_snippets=150 watch.difficulty=hard)
for each in ${model[$network]}; do sets+=("$each"); done

variants=()
variant() { variants+=(--variant "$1: loss.alpha_snippet=$2 loss.alpha_video=$3 ${*:4}"); }
variant dis 0 0
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
exec python -m d2net study ablation --data watch --cross-validate --seeds 5 --threads 1 --device cpu --out "$out" \
  "${sets[@]/#/--set=}" "${variants[@]}" "$@"
