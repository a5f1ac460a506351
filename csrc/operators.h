// The list of operators that have a struct: what Python calls follows from it.
#pragma once

#include "attention_pool.h"
#include "bottom_up_attention.h"
#include "condition_number.h"
#include "iou.h"
#include "loss.h"
#include "network.h"
#include "snippet_pdmi.h"
#include "topk_pool.h"

// HALF(function) of those that take half precision on CUDA, PLAIN(function) of others.
#define D2NET_OPERATORS(HALF, PLAIN)   \
  HALF(topk_pool)                      \
  HALF(topk_pool_backward)             \
  HALF(tcam_pool)                      \
  HALF(attention_pool)                 \
  HALF(attention_pool_backward)        \
  HALF(loss)                           \
  HALF(loss_backward)                  \
  HALF(bottom_up_attention)            \
  HALF(stream_layer)                   \
  HALF(stream_layer_backward)          \
  HALF(class_head)                     \
  HALF(class_head_backward)            \
  PLAIN(bias_sums)                     \
  PLAIN(snippet_pdmi)                  \
  PLAIN(snippet_pdmi_backward)         \
  PLAIN(log_condition_number)          \
  PLAIN(log_condition_number_backward) \
  PLAIN(joint_log_condition_number)    \
  PLAIN(iou_1d)
