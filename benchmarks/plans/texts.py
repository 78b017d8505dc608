"""What the page with plans says in each language."""

__all__ = ["CHINESE", "PAGE"]

PAGE = {
    "en": """\
# Plans for published models

`python -m benchmarks.plans` writes this page: what `lvllm plan` predicts for one user with a
prompt of {prompt} tokens and an answer of {answer}. **These are predictions.** Those of
CPUs rest on measured rates, and those of GPUs on data sheets and estimates, since LvLLM has not run
on a GPU yet. [What the planner assumes](plan.md) has a page of its own.

## The machines

{machines}
## The models

{models}
## The plans

Tokens a second of the prompt and of the answer, and the way to run it: *GPU* or *CPU* (everything
is there), *streamed* (every batch's experts are copied to the GPU), *hybrid* (long prompts are
streamed, and answers take the experts on the CPU), or *experts* (only the experts are on the CPU,
for every batch). *cached*: the GPU has the experts that are read most, of all layers, instead of
whole layers. A dash: it does not fit. No weights are rounded.

{plans}
## Against what others published

What other engines' authors published about their own, in tokens a second of all users together, and
what this LvLLM is predicted to do there. The prompts, the memory's speed and often the GPU are not
published, and are assumed; so a factor of 1.5 says little. The last column is what limits LvLLM.

{others}""",
    "zh": """\
# 已发布模型的方案

本页由 `python -m benchmarks.plans` 生成，内容是 `lvllm plan` 的预测值：一个用户，
提示 {prompt} 个 token，回答 {answer} 个 token。**这些都是预测。** CPU 的数字依据测得的速率，
GPU 的数字依据数据手册和估计，因为 LvLLM 尚未在 GPU 上运行过。
[plan.md](plan.zh.md#预测的依据) 说明预测的依据。

## 机器

{machines}
## 模型

{models}
## 方案

表中是提示和回答的每秒 token 数，以及运行方式：*GPU* 或 *CPU*（一切都在那里）、
*流式*（每个批次的专家都复制到 GPU）、*混合*（长提示流式复制，回答用 CPU 上的专家）、
*专家*（只有专家在 CPU 上，所有批次都如此）。*缓存* 表示 GPU 存放的是所有层中读取最多的专家，
而不是若干整层。短横线表示装不下。不对权重做舍入。

{plans}
## 与他人公布的结果比较

以下是其他引擎的作者公布的速度（所有用户合计的每秒 token 数），以及本版 LvLLM 在同样条件下的预测值。
提示的长度、内存的速度，往往还有 GPU 的型号都没有公布，只能假定，因此 1.5 倍的差别说明不了什么。
最后一列是 LvLLM 的瓶颈。

{others}""",
}

CHINESE = {
    "class": "类别",
    "machine": "机器",
    "read from memory": "内存读取速度",
    "desktop": "台式机",
    "old server": "旧服务器",
    "server": "服务器",
    "server, no GPU": "服务器，无 GPU",
    "two Xeons": "双路 Xeon",
    "two EPYCs": "双路 EPYC",
    "Ryzen 9 9950X, 2 channels of DDR5-5600, 192 GiB, RTX 5090": (
        "Ryzen 9 9950X，2 通道 DDR5-5600，192 GiB，RTX 5090"
    ),
    "EPYC 7763 (AVX2 only), 8 channels of DDR4-3200, 512 GiB, RTX 3090": (
        "EPYC 7763（只有 AVX2），8 通道 DDR4-3200，512 GiB，RTX 3090"
    ),
    "EPYC 9554P (Zen 4), 12 channels of DDR5-4800, 768 GiB, RTX 4090": (
        "EPYC 9554P（Zen 4），12 通道 DDR5-4800，768 GiB，RTX 4090"
    ),
    "EPYC 9654 (Zen 4), 12 channels of DDR5-4800, 768 GiB": (
        "EPYC 9654（Zen 4），12 通道 DDR5-4800，768 GiB"
    ),
    "2 Xeon 8480+ (AMX), 8 channels of DDR5-4800 each, 1 TiB, 2 RTX 4090": (
        "两颗 Xeon 8480+（AMX），各 8 通道 DDR5-4800，1 TiB，两张 RTX 4090"
    ),
    "2 EPYC 9555 (Zen 5), 12 channels of DDR5-6000 each, 1.5 TiB, RTX Pro 6000": (
        "两颗 EPYC 9555（Zen 5），各 12 通道 DDR5-6000，1.5 TiB，RTX Pro 6000"
    ),
    "model": "模型",
    "billion weights": "权重，十亿",
    "for a token": "每个 token，十亿",
    "experts": "专家",
    "in GiB": "专家，GiB",
    "all else in GiB": "其余，GiB",
    "{format}, {bits:.2f} bits": "{format}，{bits:.2f} 位",
    "GPU": "GPU",
    "CPU": "CPU",
    "streamed": "流式",
    "hybrid": "混合",
    "hybrid, cached": "混合，缓存",
    "experts, cached": "专家，缓存",
    "what": "引擎和机器",
    "prompt": "提示",
    "phase": "阶段",
    "published": "公布值",
    "predicted": "预测值",
    "ratio": "比值",
    "predicted limit": "预测的瓶颈",
    "prefill": "预填充",
    "decode": "解码",
    "experts: arithmetic": "专家：运算",
    "experts: memory bandwidth": "专家：内存带宽",
    "vLLM's own steps": "vLLM 自身的步骤",
    "handing over to the CPU": "移交给 CPU",
    "Qwen3-Next-80B bf16, LvLLM 1.7, 2 EPYC 9555, RTX Pro 6000": (
        "Qwen3-Next-80B bf16，LvLLM 1.7，两颗 EPYC 9555，RTX Pro 6000"
    ),
    "MiniMax-M2.1 fp8, LvLLM 1.7, 2 EPYC 9684X, RTX 5090": (
        "MiniMax-M2.1 fp8，LvLLM 1.7，两颗 EPYC 9684X，RTX 5090"
    ),
    "DeepSeek-R1 fp8, fastllm, 2 EPYC 9004 and a GPU": (
        "DeepSeek-R1 fp8，fastllm，两颗 EPYC 9004 和一块 GPU"
    ),
    "DeepSeek-R1 int4, fastllm, 2 EPYC 9004 and a GPU": (
        "DeepSeek-R1 int4，fastllm，两颗 EPYC 9004 和一块 GPU"
    ),
    "DeepSeek-R1 int4, fastllm, the same with 16 users": (
        "DeepSeek-R1 int4，fastllm，同上，16 个用户"
    ),
    "DeepSeek-V3 int4, arXiv 2606.10493": "DeepSeek-V3 int4，arXiv 2606.10493",
}
"""The words of the tables. One that is missing here ends the program."""
