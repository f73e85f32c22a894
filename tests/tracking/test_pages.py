"""Addresses of MLflow's pages, as people open them."""

from __future__ import annotations

from zinfer.tracking.pages import comparison_page, run_page


def test_a_server_shows_a_run_at_its_own_address_without_credentials() -> None:
    page = run_page("http://alice:geheim@host:5000/", "3", "ab")
    assert page == "http://***@host:5000/#/experiments/3/runs/ab"


def test_a_file_is_served_first() -> None:
    page = run_page("sqlite:////a b/mlflow.db", "1", "ab")
    assert page.startswith("mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db', then http://")
    assert page.endswith("/#/experiments/1/runs/ab")


def test_a_few_runs_are_compared_and_many_are_listed() -> None:
    few = comparison_page("http://host", "3", ["ab", "cd"])
    quoted = "%5B%22ab%22%2C%20%22cd%22%5D"
    assert few == f"http://host/#/compare-runs?runs={quoted}&experiments=%5B%223%22%5D"
    assert comparison_page("http://host", "3", ["x"] * 21) == "http://host/#/experiments/3/runs"
