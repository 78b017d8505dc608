"""Build the distribution: `vllm`, which is upstream with LvLLM, or `lvllm`, the plugin alone."""

import build_tools  # noqa: F401  It comes first, to refuse an unsupported Python in one line.

from setuptools import find_packages, setup

from build_tools.commands import Build, BuildEngine, BuildUpstream, PlatformDistribution
from build_tools.engine import check_tools
from build_tools.metadata import declare
from build_tools.target import ROOT, distribution_version, lvllm_version, select_target
from build_tools.upstream import pin_of

target = select_target()
check_tools()  # Before pip downloads a gigabyte of requirements.
declared = declare(target)
(ROOT / "build").mkdir(exist_ok=True)

alone = target == "empty"
setup(
    name="lvllm" if alone else "vllm",
    version=lvllm_version() if alone else distribution_version(target, pin_of(target).version),
    description="vLLM for Mixture-of-Experts models that are larger than the GPU",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.15",
    install_requires=declared.requires,
    extras_require=declared.extras,
    entry_points=declared.entry_points,
    packages=[*([] if alone else ["vllm"]), *find_packages(include=["lvllm", "lvllm.*"])],
    # If this is written out, setuptools makes an editable install with a line in a .pth file.
    # Otherwise it takes an import hook, which every start of Python would pay for.
    package_dir={"": "."},
    package_data={"lvllm": ["**/*"]},
    exclude_package_data={"": ["__pycache__/*", "**/__pycache__/*", "_engine.so"]},
    include_package_data=False,
    distclass=PlatformDistribution,
    cmdclass={"build": Build, "build_upstream": BuildUpstream, "build_engine": BuildEngine},
    options={
        # Upstream's shared objects and ours use the stable ABI, so one wheel serves every Python.
        "bdist_wheel": {"py_limited_api": "cp311"},
        # The checkout's root is on sys.path, and an old egg-info there would be taken for the
        # installed distribution.
        "egg_info": {"egg_base": "build"},
    },
)
