"""What a run will need and how long it will take, before anyone pays for a cluster: memory, tokens, FLOPs, seconds.

    unirg plan recipes/x.yaml --gpus 8 --nodes 4 --gpu h100

`trace` runs the project's own code on shapes, `policy` is the policy without weights and the data's lengths, `compute`
and `memory` count a stage's step, `stage` puts machine and counts together.
"""
