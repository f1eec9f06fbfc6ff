"""Studies: one recipe, one thing changed per arm, several seeds; resumable, compared honestly.

A study file names a base recipe, the seeds, the arms, and which stages are run once, once per seed, or for every
arm. On disk:

    runs/study/NAME/once/STAGE              shared by all seeds (run with the first one)
    runs/study/NAME/seed-S/STAGE            shared by all arms of a seed
    runs/study/NAME/seed-S/ARM/STAGE        an arm's own

What is shared appears where it is read as a relative symlink, so every folder is a run folder as any other:
`lasar recommend runs/study/NAME/seed-0/ARM` works. Stages are skipped and continued as in `lasar run`.
"""
