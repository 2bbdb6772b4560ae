"""Train a small model in any layout, clipping its gradients with distclip: the training job of `launch/`.

`launch/train.py` is the entry point. The modules import in one direction; from the bottom to the top:

    slurm                  variables of srun
    processes              ranks of this job, and values gathered from them
    devices, data          the device of a rank; global batches
    models, mesh           sequential models; how ranks share batches
    inject, checkpoint,    bad gradients on purpose; save and resume a run;
    probes                 measurements of a run beyond its norms
    parallel               models that are distributed over ranks, with their clipped optimizers
    log, replay            files of a run; one step of a run again
    config, table          Hydra's config into run configs; the closing table
    run, terminal          one run, validated; terminal output
    overrides              wrong overrides, explained
    loop                   training and evaluation
"""
