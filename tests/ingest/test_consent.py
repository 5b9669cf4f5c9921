"""What rights holders say is heard in all the forms in which it is said."""

from __future__ import annotations

import asyncio

import pytest

from ingest import consent
from ingest.config import FetchConfig
from ingest.consent import Robots, RobotsAnswer, opt_out_evidence, read_rules

WORDS = FetchConfig().opt_out


@pytest.mark.parametrize(
    ("name", "value", "heard"),
    [
        ("X-Robots-Tag", "noai", True),
        ("x-robots-tag", "NoImageAI", True),
        ("X-Robots-Tag", "noindex, nofollow", True),
        ("X-Robots-Tag", "nofollow , none", True),
        ("X-Robots-Tag", "pairmill: noai", True),
        ("X-Robots-Tag", "otherbot: noindex, nofollow", False),
        ("X-Robots-Tag", "otherbot: nofollow, pairmill: noai", True),
        ("X-Robots-Tag", "pairmill: nofollow, otherbot: noai", False),
        ("X-Robots-Tag", "unavailable_after: 25 Jun 2030 15:00:00 PST, noai", True),
        ("X-Robots-Tag", "unavailable_after: Fri, 25 Jun 2030 15:00:00 GMT, noai", True),
        ("X-Robots-Tag", "max-snippet: 20, noimageindex", True),
        ("X-Robots-Tag", "all", False),
        ("X-Robots-Tag", "noarchive", False),
        ("X-Robots-Tag", "", False),
        ("TDM-Reservation", "1", True),
        ("tdm-reservation", "0", False),
        ("X-Other", "noai", False),
    ],
)
def test_headers(name: str, value: str, heard: bool) -> None:
    headers = [("Content-Type", "image/jpeg"), (name, value)]
    evidence = opt_out_evidence(headers, WORDS, "pairmill")
    assert evidence == (f"{name}: {value}" if heard else None)
    assert opt_out_evidence(headers, (), "pairmill") is None


ROBOTS = """# rules
User-agent: otherbot
Disallow: /

User-agent: *
Disallow: /private/
Disallow: /private/deep/
Allow: /private/open/
Crawl-delay: 3
"""


@pytest.mark.parametrize(
    ("path", "evidence"),
    [
        ("/a.jpg", None),
        ("/private/open/a.jpg", None),
        ("/private/a.jpg", "robots.txt: Disallow: /private/"),
        ("/private/deep/a.jpg", "robots.txt: Disallow: /private/deep/"),
    ],
)
def test_robots_txt_and_the_rule_that_bars(path: str, evidence: str | None) -> None:
    rules = read_rules(RobotsAnswer(200, ROBOTS))
    assert rules.barred(f"http://a.example{path}", "pairmill") == evidence
    assert rules.delay_s("pairmill") == 3.0


def test_a_group_of_our_own_is_the_one_that_counts() -> None:
    rules = read_rules(RobotsAnswer(200, "User-agent: *\nAllow: /\n\nUser-agent: Pairmill\nDisallow: /\n"))
    assert rules.barred("http://a.example/x.jpg", "pairmill") == "robots.txt: Disallow: /"
    assert rules.barred("http://a.example/x.jpg", "somebody") is None


@pytest.mark.parametrize("status", [403, 404, 410])
def test_without_a_robots_txt_all_is_allowed(status: int) -> None:
    assert read_rules(RobotsAnswer(status)).barred("http://a.example/x.jpg", "pairmill") is None


def test_who_waits_for_an_answer_that_fails_hears_of_it_and_the_next_asks_again() -> None:
    asked: list[str] = []

    async def ask(url: str) -> RobotsAnswer:
        asked.append(url)
        await asyncio.sleep(0.01)
        if len(asked) == 1:
            raise ConnectionResetError("gone")
        return RobotsAnswer(200, "")

    async def main() -> None:
        robots = Robots()
        waiting = [robots.rules("http://a.example/1", ask) for _ in range(3)]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(one) for one in found] == [ConnectionResetError] * 3
        assert (await robots.rules("http://a.example/1", ask)).barred("http://a.example/1", "x") is None

    asyncio.run(main())
    assert len(asked) == 2


def test_each_origin_is_asked_once_however_many_wait() -> None:
    asked: list[str] = []

    async def ask(url: str) -> RobotsAnswer:
        asked.append(url)
        await asyncio.sleep(0.01)
        return RobotsAnswer(200, "User-agent: *\nDisallow: /private/\n")

    async def main() -> None:
        robots = Robots()
        urls = [f"http://{host}.example/{number}" for host in "ab" for number in range(20)]
        await asyncio.gather(*(robots.rules(url, ask) for url in urls))
        await robots.rules("HTTP://user@A.example/x", ask)
        await robots.rules("https://a.example/x", ask)

    asyncio.run(main())
    assert sorted(asked) == [
        "http://a.example/robots.txt", "http://b.example/robots.txt", "https://a.example/robots.txt",
    ]  # fmt: skip


def test_what_is_remembered_of_robots_txt_is_bounded_and_what_is_used_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def ask(url: str) -> RobotsAnswer:
        asked.append(url)
        return RobotsAnswer(200, "User-agent: *\n" + "Disallow: /private/\n" * 50)

    async def main() -> None:
        robots = Robots()
        for number in range(100):
            await robots.rules("http://often.example/", ask)
            await robots.rules(f"http://once-{number}.example/", ask)
        await robots.rules("http://once-0.example/", ask)

    monkeypatch.setattr(consent, "MAX_RULES_BYTES", 10_000)
    asyncio.run(main())
    assert asked.count("http://often.example/robots.txt") == 1
    assert asked.count("http://once-0.example/robots.txt") == 2
    assert len(asked) == 1 + 100 + 1


def test_a_hostile_robots_txt_costs_no_row_more_than_so_many_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = read_rules(RobotsAnswer(200, "User-agent: *\n" + "Disallow: /a\n" * 20_000))
    tried: list[str] = []
    parse = consent.Protego.parse
    monkeypatch.setattr(consent.Protego, "parse", lambda text: tried.append(text) or parse(text))
    assert rules.barred("http://a.example/a.jpg", "pairmill") == "robots.txt: Disallow: /a"
    assert len(tried) <= consent.MAX_EVIDENCE_LINES
