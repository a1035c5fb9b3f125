"""Which process launches ranks, and where it stands among the nodes."""

from megatron_gspo.launch import Node, node_of_this_process, place_of_this_process

STARTED_BY_SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "0"}


def test_a_launcher_started_once_a_node_by_srun_knows_its_node():
    assert node_of_this_process(STARTED_BY_SRUN) == Node(index=3, count=4)


def test_a_launcher_started_plainly_is_on_the_only_node():
    assert node_of_this_process({}) == Node(index=0, count=1)


def test_the_ranks_it_launches_launch_no_others_and_are_counted_over_all_nodes():
    rank = STARTED_BY_SRUN | {"RANK": "7", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert node_of_this_process(rank) is None
    place = place_of_this_process(rank)
    assert (place.rank, place.local_rank, place.world_size) == (7, 1, 8)
