"""What the pages about families of models say, in each language."""

__all__ = ["INDEX", "MACHINES", "PAGE"]

INDEX = {
    "en": """\
# Model families

`python -m benchmarks.recipes` writes this page and those that it lists, from \
[examples/configs](../../examples/configs/README.md) and from what `lvllm plan` says.

| page | models |
|---|---|
{rows}
""",
    "zh": """\
# 模型系列

本页及其列出的页面由 `python -m benchmarks.recipes` 根据
[examples/configs](../../examples/configs/README.md) 和 `lvllm plan` 的结果生成。

| 页面 | 模型 |
|---|---|
{rows}
""",
}

PAGE = {
    "en": """\
# {models}

`python -m benchmarks.recipes` writes this page; do not edit it by hand.

## Serve it

With the settings that `lvllm serve` chooses for this machine:

    lvllm plan {model}
    lvllm serve {model}

Or with the family's configuration:

    LVLLM_MOE_NUMA_ENABLED=1 vllm serve --config examples/configs/{file}.yaml

## The configuration

[What to change in it](../../examples/configs/README.md) is the same for all families.

```yaml
{config}```

{machines}[models.md](../models.md) says what of the family has been tested, and how.
""",
    "zh": """\
# {models}

本页由 `python -m benchmarks.recipes` 生成，请不要手动编辑。

## 启动服务

采用 `lvllm serve` 为本机选择的设置：

    lvllm plan {model}
    lvllm serve {model}

或采用该系列的配置文件：

    LVLLM_MOE_NUMA_ENABLED=1 vllm serve --config examples/configs/{file}.yaml

## 配置文件

[需要修改哪些内容](../../examples/configs/README.md)，对所有系列都相同。文件中的注释保持英文。

```yaml
{config}```

{machines}该系列测试过什么、如何测试，见 [models.md](../models.zh.md)。
""",
}

MACHINES = {
    "en": """\
## Which machine

What `lvllm plan` predicts for one user with a prompt of {prompt} tokens and
an answer of {answer}, without rounding weights. GPUs are estimates, because
LvLLM has not run on one yet ([how these numbers are made](../plan.md)).

{tables}
""",
    "zh": """\
## 用什么机器

以下是 `lvllm plan` 的预测值：一个用户，提示 {prompt} 个 token，回答 {answer} 个 token，
不对权重做舍入。GPU 的数字是估计值，因为 LvLLM 尚未在 GPU 上运行过
（[这些数字的依据](../plan.zh.md)）。

{tables}
""",
}
