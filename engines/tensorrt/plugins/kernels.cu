// The translation unit that is compiled ahead of time, with all kernels.
#include "grouped_nms.cu"
#include "multiscale_roi_align.cu"
#include "preprocess.cu"
