"""CUDA C++ kernels: compiled by NVRTC when first launched, kept for the life of the process.

For what Triton cannot express. NVRTC and the driver are called through cuda-bindings, which PyTorch
requires, as it requires NVRTC; no compiler has to be installed. As with a Triton kernel, the first
launch must come before the capture of a graph that holds it.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
# blocks that every card with thread-block clusters takes
_PORTABLE_CLUSTER = 8


def compile_cubin(file_name: str, defines: dict[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code of a .cu file of this folder for one compute capability; needs no GPU.

    Raises:
        RuntimeError: the compiler's log, if it does not compile.
    """
    from cuda.bindings import nvrtc

    source = (_FOLDER / file_name).read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source, file_name.encode(), 0, None, None))
    options = [f"--include-path={_FOLDER}", "--gpu-architecture=sm_{}{}".format(*capability)]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{file_name} for {options[1:]}: {log.decode(errors='replace')}")
    # bytes: the bindings write into the buffer that they are given
    cubin = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


class CudaKernel:
    """One compiled kernel of one device.

    The kernel takes one struct by value: the launch's pointers, then its 4-byte numbers.
    """

    def __init__(self, file_name: str, name: str, defines: dict[str, int], device: torch.device):
        from cuda.bindings import driver

        capability = torch.cuda.get_device_capability(device)
        # the library does not copy what it is given
        self._cubin = compile_cubin(file_name, defines, capability)
        library = _checked(driver.cuLibraryLoadData(self._cubin, [], [], 0, [], [], 0))
        self._kernel = _checked(driver.cuLibraryGetKernel(library, name.encode()))
        self._device = _checked(driver.cuDeviceGet(torch.device(device).index or 0))
        self._shared_bytes, self._cluster = 0, _PORTABLE_CLUSTER

    def launch(
        self,
        grid: int,
        threads: int,
        shared_bytes: int,
        overlap: bool,
        pointers: list[torch.Tensor | None],
        numbers: list[int | float],
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: blocks.
            shared_bytes: dynamic shared memory of a block.
            overlap: programmatic dependent launch; the kernel waits for its predecessor itself.
            pointers: None is a null pointer.
            numbers: int as int32, float as float32.
            cluster: blocks of a thread-block cluster, up to 16.
        """
        from cuda.bindings import driver

        if shared_bytes > self._shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(
                driver.cuKernelSetAttribute(attribute, shared_bytes, self._kernel, self._device)
            )
            self._shared_bytes = shared_bytes
        if cluster > self._cluster:
            attribute = driver.CUfunction_attribute
            attribute = attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _checked(driver.cuKernelSetAttribute(attribute, 1, self._kernel, self._device))
            self._cluster = cluster
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = driver.CUstream(torch.cuda.current_stream().cuda_stream)
        attributes = []
        if overlap:
            attribute = driver.CUlaunchAttribute()
            attribute.id = (
                driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            attribute.value.clusterDim.x = cluster
            attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1
            attributes.append(attribute)
        config.attrs, config.numAttrs = attributes, len(attributes)
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in pointers)
        kinds = "".join("f" if isinstance(number, float) else "i" for number in numbers)
        packed = struct.pack(f"@{len(pointers)}Q{kinds}", *addresses, *numbers)
        argument = ctypes.create_string_buffer(packed)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        function = driver.CUfunction(int(self._kernel))
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0))


@functools.cache
def cuda_kernel(
    file_name: str, name: str, defines: tuple[tuple[str, int], ...], device: torch.device
) -> CudaKernel:
    """The kernel, compiled at the first call with the same arguments."""
    return CudaKernel(file_name, name, dict(defines), device)


def _checked(result: tuple) -> object:
    """What a call of cuda-bindings returned behind its status.

    Raises:
        RuntimeError: the status is an error.
    """
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status!r}")
    return values[0] if values else None
