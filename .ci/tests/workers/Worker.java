import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;

/** A worker whose client is Java's own as it comes: two calls for a message, a pause between them. */
public class Worker {
    static final HttpClient CLIENT = HttpClient.newHttpClient(); // asks for HTTP/2 by an Upgrade

    static void post(String path) throws Exception {
        URI uri = URI.create(System.getenv("SIDECAR_URL") + path);
        HttpRequest.BodyPublisher nothing = HttpRequest.BodyPublishers.noBody();
        HttpRequest request = HttpRequest.newBuilder(uri).POST(nothing).build();
        int status = CLIENT.send(request, BodyHandlers.ofString()).statusCode();
        if (status != 200) {
            throw new IllegalStateException(path + ": " + status);
        }
    }

    public static void main(String[] arguments) throws Exception {
        long pause = (long) (1000 * Double.parseDouble(System.getenv("PAUSE_SECONDS")));
        int messages = Integer.parseInt(System.getenv().getOrDefault("MESSAGES", "3"));
        for (int number = 0; number < messages; number++) {
            post("/start-request");
            long start = System.nanoTime();
            System.out.println("took " + number);
            Thread.sleep(pause);
            System.out.println("did " + number);
            post("/end-request?duration=" + (System.nanoTime() - start) / 1e9 + "s");
        }
    }
}
