import pytest

from domainbed_kd.folder import output

# As CUDA's runtime and torch say it.
MESSAGES = {
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79 GiB": "gpu_image_gb",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": "gpu_image_gb",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": "gpu_image_gb",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate`": "memory is full",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes": "lower batch_s",
    "CUDA error: no kernel image is available for execution on the device": "not built for this",
    "CUDA driver version is insufficient for CUDA runtime version": "driver is too old",
    "The NVIDIA driver on your system is too old (found version 11040).": "driver is too old"}


@pytest.mark.parametrize("hparams", [None, '{"lr": 1}'])
@pytest.mark.parametrize("message", MESSAGES)
def test_what_a_gpu_lacks_is_said_in_a_line_and_not_blamed_on_hparams(message, hparams):
    with pytest.raises(OSError, match=MESSAGES[message]) as error, \
            output.hparams_blamed("ERM", hparams):
        raise RuntimeError(f"{message}\nCompile with TORCH_USE_CUDA_DSA")
    assert "\n" not in str(error.value) and str(error.value).startswith("ERM: ")


def test_any_other_error_without_hparams_is_ours():
    with pytest.raises(RuntimeError, match="a fault"), output.hparams_blamed("ERM", None):
        raise RuntimeError("a fault")
