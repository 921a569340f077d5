// The platform's own Go client, which never gives up: four goroutines that are out of step, two
// seconds a message, always more to do.
package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

var number atomic.Int64

func tell(path string) {
	answer, err := http.Post(os.Getenv("SIDECAR_URL")+path, "", nil)
	if err == nil {
		io.Copy(io.Discard, answer.Body)
		answer.Body.Close()
	}
}

func work(facts *os.File) {
	for {
		message := number.Add(1)
		tell("/start-request")
		fmt.Fprintf(facts, "begin %d\n", message)
		time.Sleep(min(time.Duration(message)*500*time.Millisecond, 2*time.Second))
		fmt.Fprintf(facts, "end %d\n", message)
		tell("/end-request")
	}
}

func main() {
	facts, err := os.OpenFile(os.Getenv("FACTS"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o666)
	if err != nil {
		panic(err)
	}
	for n := 0; n < 4; n++ {
		go work(facts)
	}
	select {}
}
