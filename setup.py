"""Package metadata: everything is read from settings.ini, the one source."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
SUFFIX = "_requirements"

parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

extras = {
    key.removesuffix(SUFFIX): value.split() for key, value in settings.items() if key.endswith(SUFFIX)
}
extras["all"] = sorted({spec for name, specs in extras.items() if name not in ("dev", "peers", "redteam") for spec in specs})

readme = HERE / "README.md"
setup(
    name=settings["repo"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    url=settings["git_url"],
    packages=find_packages(include=["llmops_ref", "llmops_ref.*"]),
    package_data={"llmops_ref": ["py.typed", "data/*", "data/**/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["llmops-ref=llmops_ref.cli:main"],
        "nbdev": [f"{settings['lib_name']}={settings['lib_name']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Typing :: Typed",
    ],
)
