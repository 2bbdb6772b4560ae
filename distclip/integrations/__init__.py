"""Where distclip meets other programs: the only folder that may import a framework, and nothing imports it.

`deepspeed`: `attach` a policy to an engine, from ZeRO stage 0 to 3. `mpi`: torch.distributed inside of an MPI job.
"""
