"""Reading Inductor's output code: kernels, calls in order, provenance handles."""

import pytest

from gemma4_compile.inspection.wrapper_code import read

CODE = '''
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', """
@triton.jit
def triton_poi_fused_add_0(in_ptr0):
    pass
""", device_str='cuda')
async_compile.wait(globals())

def partition_0(args):
    # [Provenance debug handles] triton_poi_fused_add_0:4
    triton_poi_fused_add_0.run(buf1, 64, stream=stream0)

class Runner:
    def call(self, args):
        arg0_1, arg1_1 = args
        assert_size_stride(arg0_1, (8, 8), (8, 1))
        buf0 = empty_strided_cuda((8, 8), (8, 1), torch.float32)
        # [Provenance debug handles] triton_poi_fused_add_0:1
        stream0 = get_raw_stream(0)
        triton_poi_fused_add_0.run(arg0_1, buf0, 64, stream=stream0)
        # Topologically Sorted Source Nodes: [linear], Original ATen: [aten.mm]
        # [Provenance debug handles] extern_kernels.mm:2
        extern_kernels.mm(reinterpret_tensor(buf0, (8, 8), (8, 1), 0), arg1_1, out=buf1)
        # [Provenance debug handles] torch.ops.gemma4.route.default:3
        buf2 = torch.ops.gemma4.route.default(buf1, arg0_1,
            8)
        partition_0([buf1])
        buf3 = torch.ops.aten.topk.default(buf1, 8)
        return (buf3,)
'''


def test_calls_in_order_with_their_handles() -> None:
    code = read(CODE)
    assert [(call.name, call.key) for call in code.calls] == [
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0:1"),
        ("extern_kernels.mm", "extern_kernels.mm:2"),
        ("torch.ops.gemma4.route.default", "torch.ops.gemma4.route.default:3"),
        ("triton_poi_fused_add_0", "triton_poi_fused_add_0:4"),
        ("torch.ops.aten.topk.default", ""),
    ]
    assert code.calls[2].text == "buf2 = torch.ops.gemma4.route.default(buf1, arg0_1, 8)"


def test_source_of_a_generated_kernel() -> None:
    assert read(CODE).kernels["triton_poi_fused_add_0"].startswith("@triton.jit\ndef triton_poi_fused_add_0(in_ptr0):")


def test_other_text_is_refused() -> None:
    with pytest.raises(ValueError, match="Inductor's code must define `call`"):
        read("x = 1")
