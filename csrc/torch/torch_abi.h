/* The functions of torch's stable C ABI that flatmin calls, declared for C17 (torch's own header needs C++).
 * tests/c/shim_check.cpp compiles this file beside torch's stable/c/shim.h: a drift is a compile error.
 * All exist since torch 2.10, the first release whose shim is versioned. A non-zero AOTITorchError means that a C++
 * exception was caught; with checked arguments it does not happen. */
#ifndef FM_TORCH_ABI_H
#define FM_TORCH_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The release whose value encoding our boxed kernels use; torch converts for it, whatever its own version. */
#define FM_TORCH_ABI_VERSION UINT64_C(0x020a000000000000)

#ifndef __cplusplus
typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct StableListOpaque *StableListHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef struct CUDAGuardOpaque *CUDAGuardHandle;
typedef uint64_t StableIValue;
typedef int32_t AOTITorchError;
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void *ctx);
#endif

/* Registration. The library objects are ours and live as long as the process. */
AOTITorchError aoti_torch_library_init_def(const char *ns, const char *file, uint32_t line, TorchLibraryHandle *ret);
AOTITorchError aoti_torch_library_init_fragment(const char *ns, const char *file, uint32_t line,
                                                TorchLibraryHandle *ret);
AOTITorchError aoti_torch_library_init_impl(const char *ns, const char *k, const char *file, uint32_t line,
                                            TorchLibraryHandle *ret);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char *schema);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char *name,
                                  void (*fn)(StableIValue *, uint64_t, uint64_t), uint64_t extension_build_version);

/* Lists. A boxed kernel owns the list handle on its stack; get_item returns a new reference that is ours too. */
AOTITorchError torch_list_size(StableListHandle list_handle, size_t *size);
AOTITorchError torch_list_get_item(StableListHandle list_handle, size_t index, StableIValue *element);
AOTITorchError torch_delete_list(StableListHandle list_handle);

/* Tensors. Pointers, sizes and strides are borrowed from the tensor. */
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void **ret_data_ptr);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t *ret_dim);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t **ret_sizes);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t **ret_strides);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t *ret_dtype);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t *ret_device_type);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t *ret_device_index);
AOTITorchError aoti_torch_get_layout(AtenTensorHandle tensor, int32_t *ret_layout);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t *sizes_ptr, const int64_t *strides_ptr,
                                        int32_t dtype, int32_t device_type, int32_t device_index,
                                        AtenTensorHandle *ret_new_tensor);

/* Codes. */
int32_t aoti_torch_dtype_float32(void);
int32_t aoti_torch_dtype_float64(void);
int32_t aoti_torch_dtype_bfloat16(void);
int32_t aoti_torch_dtype_float16(void);
int32_t aoti_torch_dtype_int64(void);
int32_t aoti_torch_dtype_uint8(void);
int32_t aoti_torch_dtype_uint64(void);
int32_t aoti_torch_layout_strided(void);
int32_t aoti_torch_device_type_cpu(void);
int32_t aoti_torch_device_type_cuda(void);

/* Threads and errors. aoti_torch_check throws a C++ exception through our frames if cond is false: free first. */
AOTITorchError torch_get_num_threads(uint32_t *out_num_threads);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void *ctx);
void aoti_torch_check(bool cond, const char *func, const char *file, uint32_t line, const char *msg);

/* CUDA, in libtorch_cuda: only cuda/backend_cuda.c calls these. The guard selects a device until it is deleted. */
AOTITorchError aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle *ret_guard);
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void **ret_stream);
#endif
