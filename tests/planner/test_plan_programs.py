"""Reading compiled programs: collectives, memory traffic and loops, in the notations of the TPU and the CPU compiler."""

import jax
import jax.numpy as jnp
import pytest

from icar_jax.planner import cost, hlo
from icar_jax.planner.chips import PlanError
from icar_jax.planner.cost import Collective

# In the notations of the TPU compiler: a scan of 24 blocks with an all-gather and a reduce-scatter each, as it writes that one.
SCANNED = """HloModule jit_step, is_scheduled=true, num_partitions=8

%all-reduce-scatter.1 (input.2: bf16[1024,1024]) -> bf16[256,1024] {
  %input.2 = WHOLE parameter(0)
  %all-reduce.5 = bf16[1024,1024]{1,0} all-reduce(%input.2), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %dynamic-slice.21 = PART dynamic-slice(%all-reduce.5, %multiply.5), dynamic_slice_sizes={256,1024}
}

%take (param_0: bf16[24,256,1024], param_1: s32[]) -> bf16[256,1024] {
  %param_0 = STACK parameter(0)
  %param_1 = s32[] parameter(1)
  %slice.1 = bf16[1,256,1024]{2,1,0:S(1)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,256,1024}
  ROOT %bitcast.1 = PART bitcast(%slice.1)
}

%put (param_0.1: bf16[24,256,1024], param_1.1: bf16[256,1024], param_2.1: s32[]) -> bf16[24,256,1024] {
  %param_0.1 = STACK parameter(0)
  %param_1.1 = PART parameter(1)
  %param_2.1 = s32[] parameter(2)
  %bitcast.2 = bf16[1,256,1024]{2,1,0:S(1)} bitcast(%param_1.1)
  ROOT %update.1 = STACK dynamic-update-slice(%param_0.1, %bitcast.2, %param_2.1)
}

%cond (param.1: (s32[], bf16[24,256,1024], bf16[24,256,1024])) -> pred[] {
  %constant.9 = s32[] constant(24)
  %param.1 = (s32[], STACK, STACK) parameter(0)
  %gte.1 = s32[] get-tuple-element(%param.1), index=0
  ROOT %lt.1 = pred[] compare(%gte.1, %constant.9), direction=LT
}

%body (param.2: (s32[], bf16[24,256,1024], bf16[24,256,1024])) -> (s32[], bf16[24,256,1024], bf16[24,256,1024]) {
  %param.2 = (s32[], STACK, STACK) parameter(0)
  %gte.2 = s32[] get-tuple-element(%param.2), index=0
  %gte.3 = STACK get-tuple-element(%param.2), index=1
  %gte.4 = STACK get-tuple-element(%param.2), index=2
  %fusion.1 = PART fusion(%gte.3, %gte.2), kind=kLoop, calls=%take, backend_config={"estimated_cycles":"1000"}
  %gather.1 = WHOLE all-gather(%fusion.1), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %fusion.2 = PART fusion(%gather.1), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"500"}
  %fusion.3 = STACK fusion(%gte.4, %fusion.2, %gte.2), kind=kLoop, calls=%put
  ROOT %tuple.1 = (s32[], STACK, STACK) tuple(%gte.2, %gte.3, %fusion.3)
}

ENTRY %main (p0: bf16[24,256,1024], p1: bf16[24,256,1024]) -> bf16[24,256,1024] {
  %p0 = STACK parameter(0)
  %p1 = STACK parameter(1)
  %zero = s32[] constant(0)
  %tuple.2 = (s32[], STACK, STACK) tuple(%zero, %p0, %p1)
  %while.1 = (s32[], STACK, STACK) while(%tuple.2), condition=%cond, body=%body
  ROOT %gte.5 = STACK get-tuple-element(%while.1), index=2
}
"""
for short, shape in (
    ("STACK", "bf16[24,256,1024]{2,1,0:T(8,128)(2,1)}"),
    ("PART", "bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}"),
    ("WHOLE", "bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)}"),
):
    SCANNED = SCANNED.replace(short, shape)
BLOCK = 256 * 1024 * 2  # bytes of one chip's quarter of a block


def program(*lines, partitions=8, computations=""):
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(
        f"HloModule m, num_partitions={partitions}\n\n{computations}\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n"
    )


def test_collectives_of_a_loop_count_once_a_turn():
    module = hlo.parse(SCANNED)
    assert cost.collectives(module) == (
        Collective("all-gather", 24, 24 * 3 * BLOCK),
        Collective("reduce-scatter", 24, 24 * 3 * BLOCK),
    )
    assert module.unknown_loops == []


def test_memory_traffic_of_a_loop_is_its_slices():
    """Each turn reads one block of the stack and writes one; what lies on the chip (S(1)) costs nothing."""
    flags = 24 * 4 * 2  # the loop's counter, read by two fusions
    assert cost.memory_traffic(hlo.parse(SCANNED)) == 24 * 2 * BLOCK + flags


def test_cycle_estimates_are_summed_over_turns():
    assert cost.cycles(hlo.parse(SCANNED)) == 24 * 1500


def test_kernels_are_counted_and_their_line_breaks_end_no_computation():
    kernel = (
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n"xprof_metadata":"{}"\n'
        '}}, metadata={op_name="splash"}'
    )
    module = program(
        "%x = f32[8]{0} parameter(0)",
        f"%a = (f32[8]{{0}}, f32[4]{{0}}) custom-call(%x), {kernel}",
        "%b = f32[8]{0} get-tuple-element(%a), index=0, frontend_attributes={kernel_metadata={\n}}",
        f"%c = f32[8]{{0}} custom-call(%b), {kernel}",
        'ROOT %d = f32[8]{0} negate(%c), backend_config={"estimated_cycles":"7"}',
    )
    assert cost.kernels_without_estimate(module) == 2
    assert cost.cycles(module) == 7 and cost.memory_traffic(module) == 4 * (8 + 8 + 4 + 8 + 8 + 8 + 8)
    assert cost.kernels_without_estimate(hlo.parse(SCANNED)) == 0


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,2},{4,6},{1,3},{5,7}}", 2),
        ("replica_groups=[2,4]<=[2,2,2]T(0,2,1)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", 4),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", 2),
        ("replica_groups={}", 8),
    ],
)
def test_bytes_sent_follow_the_group(groups, size):
    kinds = {"all-gather": size - 1, "reduce-scatter": (size - 1) / size, "all-to-all": (size - 1) / size}
    kinds["all-reduce"] = 2 * (size - 1) / size
    for kind, share in kinds.items():
        module = program(
            "%x = f32[1024]{0} parameter(0)", f"ROOT %y = f32[1024]{{0}} {kind}(%x), channel_id=3, {groups}, dimensions={{0}}"
        )
        assert cost.collectives(module) == (Collective(kind, 1, int(4096 * share)),), kind


def test_unreadable_groups_are_an_error():
    module = program("%x = f32[8]{0} parameter(0)", "ROOT %y = f32[8]{0} all-reduce(%x), replica_groups=strange[8]")
    with pytest.raises(PlanError, match="cannot parse the replica groups of a collective.*strange"):
        cost.collectives(module)


def test_a_collective_within_one_chip_sends_nothing():
    module = program("%x = f32[8]{0} parameter(0)", "ROOT %y = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}")
    assert cost.collectives(module) == ()


def test_rounds_of_a_ring_share_a_channel_and_all_count():
    pairs = "channel_id=1, source_target_pairs={{0,1},{1,0}}"
    module = program(
        "%x = f32[256]{0} parameter(0)",
        f"%a = f32[256]{{0}} collective-permute(%x), {pairs}",
        f"%b = (f32[256]{{0}}, f32[256]{{0}}, u32[]{{:S(2)}}, u32[]{{:S(2)}}) collective-permute-start(%a), {pairs}",
        "ROOT %c = f32[256]{0} collective-permute-done(%b)",
    )
    assert cost.collectives(module) == (Collective("collective-permute", 2, 2048),)


def test_an_asynchronous_collective_counts_once():
    """The TPU compiler repeats it in the fusion that starts it, in those that overlap it, and in the one that waits."""
    gather = '%g{0} = bf16[512]{{0}} all-gather(%p{0}), channel_id=126, replica_groups=[2,4]<=[8], dimensions={{0}}, frontend_attributes={{chain_id="22"}}'  # noqa: E501
    computations = "\n".join(
        f"%part{i} (p{i}: bf16[128]) -> bf16[512] {{\n  %p{i} = bf16[128]{{0}} parameter(0)\n  ROOT {gather.format(i)}\n}}\n"
        for i in range(3)
    )
    lines = [f"%f{i} = bf16[512]{{0}} fusion(%x), kind=kCustom, calls=%part{i}" for i in range(3)]
    module = program("%x = bf16[128]{0} parameter(0)", *lines, computations=computations)
    assert cost.collectives(module) == (Collective("all-gather", 1, 3 * 256),)


def test_a_loop_that_tells_its_length_and_one_that_does_not():
    computations = (
        "%b (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
        "  ROOT %s = f32[8]{0} all-reduce(%p), replica_groups={}\n}\n"
        "%c (q: f32[8]) -> pred[] {\n  %q = f32[8]{0} parameter(0)\n  ROOT %r = pred[] custom-call(%q)\n}\n"
    )
    loop = "ROOT %w = f32[8]{0} while(%x), condition=%c, body=%b"
    known = program(
        "%x = f32[8]{0} parameter(0)", loop + ', backend_config={"known_trip_count":{"n":"5"}}', computations=computations
    )
    assert cost.collectives(known)[0].count == 5 and known.unknown_loops == []
    unknown = program("%x = f32[8]{0} parameter(0)", loop, computations=computations)
    assert cost.collectives(unknown)[0].count == 1 and unknown.unknown_loops == ["w"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("bf16[8,128]{1,0:T(8,128)S(1)}", [(2048, False)]),
        ("f32[3,5]{1,0}", [(60, True)]),
        ("(s32[], pred[7]{0}, u8[4]{0:S(5)})", [(4, True), (7, True), (4, False)]),
        ("s4[8]{0}", [(4, True)]),
        ("token[]", [(0, True)]),
    ],
)
def test_shapes(text, expected):
    assert [(shape.bytes, shape.main) for shape in hlo.parse_shapes(text)] == expected


def test_a_text_without_a_program_is_an_error():
    with pytest.raises(PlanError, match="no entry computation"):
        hlo.parse("HloModule nothing\n")


def test_a_program_of_this_machine_is_read_as_its_compiler_counts_it():
    """Without loops, traffic is what XLA's own analysis says; with a scan it grows with the turns."""

    def traffic(function, *shapes):
        compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
        return cost.memory_traffic(hlo.parse(compiled.as_text())), compiled.cost_analysis()["bytes accessed"]

    found, expected = traffic(lambda x, w: jnp.tanh(x @ w).sum(0), (512, 256), (256, 256))
    assert found == pytest.approx(expected, rel=0.05)
    scan = lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]
    six, twelve = (traffic(scan, (512, 256), (turns, 256, 256))[0] for turns in (6, 12))
    turn = 4 * (2 * 512 * 256 + 256 * 256)  # what a turn cannot avoid: x in, a slice of ws, x out
    assert 1 <= (twelve - six) / 6 / turn < 4
