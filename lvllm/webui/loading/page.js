// Shows what the program says about the loading, and then makes way for the chat.
"use strict";

const text = document.getElementById("text");
const bar = document.getElementById("bar");
const seconds = document.getElementById("seconds");
const events = new EventSource("progress");
let began = performance.now();

const clock = setInterval(() => {
    seconds.textContent = `${Math.round((performance.now() - began) / 1000)} s`;
}, 250);

function fail(why) {
    events.close();
    clearInterval(clock);
    document.body.className = "failed";
    text.textContent = why;
}

events.onmessage = (event) => {
    const said = JSON.parse(event.data);
    if (said.state === "failed") {
        fail(said.text);
        return;
    }
    began = performance.now() - 1000 * said.seconds;
    text.textContent = said.text;
    if (said.percent === undefined) {
        bar.removeAttribute("value");
    } else {
        bar.value = said.percent;
    }
    if (said.state === "ready") {
        events.close();
        location.reload();
    }
};

events.onerror = () => fail("lvllm webui has ended");
