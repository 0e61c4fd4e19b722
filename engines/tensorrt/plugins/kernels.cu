// The translation unit that is compiled ahead: every kernel, one image.
#include "grouped_nms.cu"
#include "multiscale_roi_align.cu"
#include "preprocess.cu"
