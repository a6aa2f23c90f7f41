"""Reads the schedules of programs whose transfer overlaps with a kernel, or with none."""

import pytest

from tests.kernels.hlo_schedule import Schedule, Transfer

PROGRAM = """\
HloModule jit_run, is_scheduled=true, entry_computation_layout={(f32[8]{0:T(8)})->f32[8]{0:T(8)}}

%nothing.1 (a.1: f32[8]) -> f32[8] {
  ROOT %a.1 = f32[8]{0:T(8)} parameter(0)
}

%travel.20 (a.20: f32[8]) -> f32[8] {
  %a.20 = f32[8]{0:T(8)} parameter(0)
  ROOT %hop.21 = f32[8]{0:T(8)} ragged-all-to-all(%a.20), replica_groups={{0,1}}
}

%attend.2 (a.2: f32[8]) -> f32[8] {
  %a.2 = f32[8]{0:T(8)} parameter(0)
  ROOT %kernel.3 = f32[8]{0:T(8)} custom-call(%a.2), custom_call_target="tpu_custom_call"
}

%body.4 (carry.5: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry.5 = (s32[]{:T(128)}, f32[8]{0:T(8)}) parameter(0)
  %index.6 = s32[]{:T(128)} get-tuple-element(%carry.5), index=0
  %keys.7 = f32[8]{0:T(8)} get-tuple-element(%carry.5), index=1
BODY
  ROOT %tuple.8 = (s32[]{:T(128)}, /*index=1*/f32[8]{0:T(8)}) tuple(%index.6, %done.9)
}

%condition.10 (carry.11: (s32[], f32[8])) -> pred[] {
  %bound.12 = s32[]{:T(128)} constant(15), metadata={op_name="jit(run)/while"}
  %carry.11 = (s32[]{:T(128)}, f32[8]{0:T(8)}) parameter(0)
  %index.13 = s32[]{:T(128)} get-tuple-element(%carry.11), index=0
  ROOT %less.14 = pred[]{:T(512)} compare(%index.13, %bound.12), direction=LT
}

ENTRY %main.15 (start.16: (s32[], f32[8])) -> (s32[], f32[8]) {
  %start.16 = (s32[]{:T(128)}, f32[8]{0:T(8)}) parameter(0)
  ROOT %while.17 = (s32[]{:T(128)}, f32[8]{0:T(8)}) while(%start.16), condition=%condition.10, \
body=%body.4
}
"""
START = (
  "  %start.18 = (f32[8]{0:T(8)}, f32[8]{0:T(8)}, u32[]{:S(2)})"
  " collective-permute-start(%keys.7), channel_id=1, source_target_pairs={{0,1},{1,0}}"
)
ATTEND = (
  "  %out.19 = f32[8]{0:T(8)} conditional(%index.6, %keys.7, %keys.7),"
  " branch_computations={%nothing.1, %attend.2}"
)
DONE = '  %done.9 = f32[8]{0:T(8)} collective-permute-done(%start.18), metadata={op_name="x"}'
START_CALL = (
  "  %start.18 = ((f32[8]{0:T(8)}), f32[8]{0:T(8)}, u32[]{:S(2)}) async-start(%keys.7),"
  " calls=%travel.20"
)
DONE_CALL = "  %done.9 = f32[8]{0:T(8)} async-done(%start.18)"
# Starts something that is no transfer.
OTHER_CALL = START_CALL.replace("%start.18", "%start.22").replace("%travel.20", "%nothing.1")
AT_ONCE = (
  "  %done.9 = f32[8]{0:T(8)} collective-permute(%keys.7), source_target_pairs={{0,1},{1,0}}"
)


@pytest.mark.parametrize(
  "body, kernels",
  (
    ((START, ATTEND, DONE), {"kernel.3"}),
    ((ATTEND, START, DONE), set()),
    ((START, DONE, ATTEND), set()),
    ((START_CALL, ATTEND, DONE_CALL), {"kernel.3"}),
    ((START_CALL, DONE_CALL, ATTEND), set()),
    ((OTHER_CALL, START_CALL, ATTEND, DONE_CALL), {"kernel.3"}),
    ((ATTEND, AT_ONCE), set()),
  ),
)
def test_kernels_beside_a_transfer(body, kernels):
  schedule = Schedule(PROGRAM.replace("BODY", "\n".join(body)))
  assert schedule.kernels() == {"kernel.3"}
  assert schedule.transfers() == [Transfer("f32[8]", 15, frozenset(kernels))]


def test_the_bound_of_a_loop_without_transfers_may_depend_on_data():
  loop = PROGRAM.replace("BODY", ATTEND.replace("%out.19", "%done.9")).replace(
    "%bound.12 = s32[]{:T(128)} constant(15)", "%bound.12 = s32[]{:T(128)} multiply(%a.1, %a.1)"
  )
  assert Schedule(loop).transfers() == []


def test_a_program_without_a_schedule_is_refused():
  with pytest.raises(ValueError, match="not that of their execution"):
    Schedule(PROGRAM.replace(", is_scheduled=true", ""))
