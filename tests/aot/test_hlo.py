"""Reading a compiled program: on a text by hand, whose FLOPs, bytes and trips are plain."""

import numpy as np
import pytest

from rcm_jax.aot import collectives, costs, hlo, live
from rcm_jax.aot.gpus import find_gpu, gpus

MESH = {"data": 2, "fsdp": 4, "sequence": 1}
TEXT = r"""HloModule jit_step, is_scheduled=true

%fused (p0: bf16[64,32], p1: bf16[32,16]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (arg: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {
  %arg = (s32[], bf16[64,32]{1,0}) parameter(0)
  %x = bf16[64,32]{1,0} get-tuple-element(%arg), index=1
  %i = s32[] get-tuple-element(%arg), index=0
  %w = bf16[8,16]{1,0} constant({...})
  %gather-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%w), channel_id=1, GROUPS, dimensions={0}
  %meanwhile = f32[1024,1024]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %gather-done = bf16[32,16]{1,0} all-gather-done(%gather-start)
  %y = bf16[64,16]{1,0} fusion(%x, %gather-done), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/blocks/mul"}
  ROOT %out = (s32[], bf16[64,32]{1,0}) tuple(%i, %x)
}

%condition (arg: (s32[], bf16[64,32])) -> pred[] {
  %arg.1 = (s32[], bf16[64,32]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (state: bf16[64,32]) -> (s32[], bf16[64,32]) {
  %state = bf16[64,32]{1,0} parameter(0), metadata={op_name="state.student[\'q\'][\'kernel\']"}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[64,32]{1,0}) tuple(%zero, %state)
  %q = bf16[2,64,4,32]{3,2,1,0} constant({...})
  %k = bf16[2,128,4,32]{3,2,1,0} constant({...})
  %call = (bf16[2,64,4,32]{3,2,1,0}, f32[2,4,64]{2,1,0}) custom-call(%q, %k, %k), TRITON
  %sum = f32[16]{0} all-reduce(%zero), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%fused
  ROOT %loop = (s32[], bf16[64,32]{1,0}) while(%start), condition=%condition, body=%body, THIRTY
}
"""
for short, long in {
    "GROUPS": "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}",
    "TRITON": 'custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/attention_forward/pallas_call"}',
    "THIRTY": 'metadata={op_name="jit(step)/while"}, backend_config={"known_trip_count":{"n":"30"}}',
}.items():
    TEXT = TEXT.replace(short, long)
PEAK = r"""HloLiveRange (max 8):
  Live ranges at 6 (peak):
    loop{1}: 4096 bytes (cumulative: 4096 bytes)
    state{}: 8192 bytes (cumulative: 12288 bytes)
  Stack trace breakdown
"""


@pytest.fixture(scope="module")
def module():
    return hlo.read(TEXT)


def test_loops_count_as_often_as_they_run(module):
    times = {i.name: n for _, i, n in module.scheduled()}
    assert times["y"] == 30
    assert times["call"] == 1
    assert "dot.1" not in times  # inside a fusion
    assert module.unknown_trips() == []
    unknown = hlo.read(TEXT.replace('"known_trip_count":{"n":"30"}', ""))
    assert unknown.unknown_trips() == ["jit(step)/while"]


def test_flops(module):
    product, pairs = 2 * 64 * 16 * 32, 64 * 128
    forward = 2 * 2 * 2 * 4 * 32 * pairs  # two products of B 2, N 4, D 32
    assert costs.flops(module) == 30 * 2 * product + forward
    assert costs.kernels(module) == {"forward": 1}
    masked = hlo.read(TEXT.replace("attention_forward/", "attention_forward/pairs_100/"))
    assert costs.flops(masked) == 30 * 2 * product + forward * 100 / pairs


def test_collectives(module):
    gather, reduce = collectives.collectives(module, MESH, find_gpu("h100"))
    assert (gather.kind, gather.axes, gather.count, gather.bytes) == ("all-gather", ("fsdp",), 30, 30 * 32 * 16 * 2)
    assert gather.covered == 1  # a fusion that writes 4 MiB stands between its start and its end
    assert (reduce.kind, reduce.axes, reduce.count, reduce.bytes) == ("all-reduce", ("data",), 1, 64)
    assert reduce.covered == 0
    link = costs.RATES["h100"].links
    assert gather.seconds == pytest.approx(30 * 32 * 16 * 2 * 3 / 4 / link)
    assert reduce.seconds == pytest.approx(2 * 64 / 2 / link)


def test_between_hosts_the_network_is_the_rate(module):
    of_two_hosts = hlo.read(TEXT.replace("{{0,4},{1,5},{2,6},{3,7}}", "{{0,8},{1,9}}"))
    *_, reduce = collectives.collectives(of_two_hosts, {"data": 2, "fsdp": 8}, find_gpu("h100"))
    assert reduce.seconds == pytest.approx(2 * 64 / 2 / costs.RATES["h100"].network)


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        ("mesh['a'=2,'b'=3] {'a'}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['a'=2,'b'=3] {'a','b'}", [[0, 1, 2, 3, 4, 5]]),
        ("mesh['a'=6] {'a':(1)2}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['a'=3,'b'=1,'c'=2], device_ids=([2,3]T(1,0)) {'a'}", [[0, 1, 2], [3, 4, 5]]),
        ("mesh['a'=3,'b'=1,'c'=2], device_ids=([2,3]T(1,0)) {'c'}", [[0, 3], [1, 4], [2, 5]]),
        ("{}", [[0, 1, 2, 3, 4, 5]]),
        ("mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'b'}", [[0, 2, 4], [1, 3, 5]]),
        ("mesh['a'=2,'b'=1,'c'=3], device_ids=([6]) {'c'}", [[0, 1, 2], [3, 4, 5]]),
        ("[2,3]<=[6]", [[0, 1, 2], [3, 4, 5]]),
        ("[3,2]<=[2,3]T(1,0)", [[0, 3], [1, 4], [2, 5]]),
        ("{{0,1,2},{3,4,5}}", [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_groups_of_devices(words, groups):
    np.testing.assert_array_equal(collectives.replica_groups(f"x, replica_groups={words}, y", 6), groups)


@pytest.mark.parametrize("words", ["mesh['a'=6] device_ids=(new) {'a'}", "mesh['a'=6], device_ids=(0,1) {'a'}", "@all"])
def test_groups_in_a_form_that_is_not_known_are_not_taken_for_all_devices(words):
    with pytest.raises(ValueError, match="the devices of a collective are not understood"):
        collectives.replica_groups(f"x, replica_groups={words}, y", 6)


def test_activations_of_the_whole_batch_are_noticed():
    def transfer(*dims):
        return collectives.Transfer("all-gather", ("fsdp",), 1, 1, 1.0, 0.0, dims, "")

    whole, weights = transfer(8, 100, 64), transfer(8, 5)
    of_a_video, head = transfer(100, 64), transfer(100, 16)
    sent = [whole, weights, transfer(5120, 5120), of_a_video, head]
    assert collectives.gathered(sent, batch=8, tokens=100, width=64) == [whole, of_a_video]


def test_what_is_held_at_the_peak(module):
    first, second = live.live_at_peak(module, PEAK)
    assert (first.name, first.shape, first.bytes) == ("state.student['q']['kernel']", "bf16[64,32]", 8192)
    assert (second.name, second.shape) == ("jit(step)/while", "bf16[64,32]")
    assert live.live_at_peak(module, "") == []


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.read("HloModule nothing")


def test_gpus():
    assert find_gpu("H100") is find_gpu("h100")
    assert find_gpu("RTX 4090").capability == 8.9
    assert find_gpu("h200").memory > find_gpu("h100").memory
    assert set(gpus()) == set(costs.RATES)
    with pytest.raises(ValueError, match="'h300' is not known; use one of a100, b200, h100, h200, rtx_4090"):
        find_gpu("h300")
