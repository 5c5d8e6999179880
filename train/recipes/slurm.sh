#!/bin/bash
# A run over four nodes of four GPUs each, that saves and ends well when its time is up, and goes on when requeued.
#
#   sbatch train/recipes/slurm.sh train/recipes/molecules.toml runs/molecules
#
# `equipot train` reads its ranks from srun's variables: no torchrun is needed. The run's directory must lie where
# all nodes reach it.
#
#SBATCH --job-name=equipot
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the end, to this script:
#SBATCH --signal=B:USR1@120

set -uo pipefail
recipe=$1
run=$2
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# One rank that fails ends the step, and with it the others.
srun --kill-on-bad-exit=1 equipot train "$recipe" --out "$run" --resume &
step=$!

# Slurm's signal, passed on: the ranks save and end with exit code 0, and the job goes on when it is its turn again.
stopped=
trap 'stopped=yes; kill -USR1 $step' USR1
wait $step
code=$?
if [ -n "$stopped" ]; then # wait was interrupted
  wait $step
  code=$?
  [ $code -eq 0 ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
